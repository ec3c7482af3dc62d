"""The method: values in, values out. It imports neither Ray nor vLLM and reads no environment variable.

pool/        questions: where they are read from, which rows are usable, how they are split
model/       models and adapters: loaded, merged, checked, sized
sampling/    what a sampler is asked, and a sampler on plain transformers
answers/     do two answers mean the same? clusters and grades
knowledge/   what the model knows: semantic entropy, labels, hidden states, probe
selection/   query strategies
decoder/     hidden states of unknown questions to new questions
annotation/  who answers: the pool, people, a teacher
teacher/     an OpenAI-compatible endpoint: requests, replies, prices, the cap on money
tuning/      LoRA on annotated answers (SFT, DPO), KnowTuning
evaluation/  what is measured: accuracy, AUROC, text metrics, facts, calibration
testbed/     a model whose knowledge is known exactly

errors.py    the exception tree
section.py   base class of all config sections
prompts.py   every prompt
schemas.py   the Arrow schema of every table
seeds.py     the seed of each row's random numbers
"""
