"""Models and adapters.

loading.py         model directories: checked, identified, loaded
adapter.py         AdapterConfig (LoRA rank and others); adapters made, loaded, saved
virtual_tokens.py  P-tuning and prefix tuning as a cache to start from
merging.py         an adapter added to the model's weights
canary.py          proof that an adapter changes the model's answers in every engine
tokens.py          token ids of prompts and completions
sizing.py          how many GPUs a model needs
muon.py            the Muon optimiser, for matrices that are trained from scratch
"""
