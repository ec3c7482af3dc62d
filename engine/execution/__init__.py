"""How a stage is skipped, made, measured and committed.

campaign.py   state of a run; `Campaign.make` makes a stage
shard_run.py  the shards of a stage, whatever happens to its workers
jobs.py       what a worker does with one shard
isolation.py  questions that break the work are found and set aside
meter.py      seconds, CPU- and GPU-seconds of a stage
hours.py      the cap on hours
remaining.py  how much work a run has left
sharing.py    what the runs of a benchmark share
cluster.py    Ray for the length of a command
trackers.py   TensorBoard, Weights & Biases, MLflow
"""
