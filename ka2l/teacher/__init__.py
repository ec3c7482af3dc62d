"""A teacher model behind an OpenAI-compatible endpoint.

config.py      TeacherConfig: endpoint, model, prices of its tokens
request.py     a prompt, its request and its key in the journal
endpoint.py    many prompts at once
batch.py       the Batch API
local.py       a model on the run's own workers
reply.py       replies, and what is still to be asked
structured.py  one structured reply for each prompt
limits.py      the cap on money; rate limits
faults.py      what an endpoint's errors mean
"""
