"""Sampled answers.

sampler.py     SamplerConfig (stop strings, temperature, samples) and a sampler on plain transformers
early_stop.py  sampling stops once a question's entropy is certain enough
"""
