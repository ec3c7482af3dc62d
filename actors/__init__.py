"""Ray hosts of samplers, extractors, scorers and training; no maths.

host.py               what hosts share
faults.py             deadlines, retries, and how much may fail
placement.py          room for workers, set aside in placement groups
leases.py             who of many runs gets workers next
shared.py             workers that several runs ask
metrics.py            figures for Ray's metrics
shards.py             a job over shards on Ray Data
pool.py               workers that stay, asked again and again
sampler.py            hosts vLLM
extractor.py          hosts hidden states and perplexities
scorer.py             hosts equivalence
teacher.py            hosts a local teacher
pool_reader.py        reads pools with Ray Data
pool_blocks.py        what its workers do with a block of rows
trainer.py            Ray Train around tuning
decoder.py            Ray Train around the decoder; decoding in a task
"""
