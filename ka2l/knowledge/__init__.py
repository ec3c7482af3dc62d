"""What the model knows.

semantic_entropy.py   uncertainty of clusters of answers
labels.py             entropy to known or unknown, by a threshold
extraction_config.py  which hidden states are read
readable_model.py     the model whose layers are read
hidden_states.py      prompts to pooled hidden states, and the certainty of the first answer token
probe.py              classifier on hidden states: layer sweep, calibration, metrics
probe_training.py     its training, all layers at once
first_token.py        its score joined with the certainty of the first answer token
calibration.py        scores to probabilities
evidence.py           evidence for unknown, summed over model states and sampled answers
wrongness.py          second axis: P(sure and wrong), learnt from annotations
perplexity.py         log-likelihoods of questions and facts
p_true.py             P(True): the model's own verdict on its answer
"""
