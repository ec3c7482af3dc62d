"""Ray hosts of samplers, extractors, scorers and training. They hold no maths.

workers/        where workers come from and how work reaches them
host.py         what hosts share
sampler.py      hosts vLLM
extractor.py    hosts hidden states and perplexities
scorer.py       hosts clustering and grading
teacher.py      hosts a local teacher
tuner.py        tuning on Ray Train
decoder.py      the decoder's fit on Ray Train, and decoding in a task
pool_reader.py  reads a pool with Ray Data
pool_blocks.py  what its workers do with a block of rows
metrics.py      figures for Ray's metrics
"""
