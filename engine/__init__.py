"""The loop and all that a user meets. Start reading at loop.py.

loop.py               the active-learning loop: start reading here
stages/               the stages: declared, and in their order
stage_kind.py         how a stage is declared
stopping.py           when a run has reached its end
campaign.py           how a stage is skipped, made and committed
shard_run.py          a stage's shards, whatever becomes of its workers
jobs.py               what a worker does with a shard
isolation.py          questions that break the work are found and set aside
artifacts.py          run directory: shards, manifests, fingerprints
storage.py            files that are there whole or not at all
config.py             RunConfig, presets, --set
build.py              where a `kind:` becomes an object
teachers.py           teachers, ready to be asked
cluster.py            Ray for the length of a command: joined, or started here
matrix.py             a benchmark's models x data x strategies x seeds
matrix_sizes.py       GPUs of its cells
benchmark.py          runs them side by side
benchmark_*.py        their report: learning curves, cost, agreement
cell_*.py             the process of a cell
work.py               how much work a run has left
sharing.py            what cells share
estimate.py           what a run will take
warm_up.py            measured on some questions
ledger.py             what was spent
meter.py              seconds, CPU- and GPU-seconds of a stage
hours.py              the cap on hours
journal.py            a teacher's replies, each on disk before it is used
human.py              people's tasks and answers of a run
annotate_app.py       the page to answer on
annotate_queue.py     which browser has which question
annotate_store.py     people's answers on disk
events.py             events.jsonl
progress.py           a live bar, or a line every half minute
trackers.py           TensorBoard, Weights & Biases, MLflow
prices.py             what annotation and computation are worth
report*.py            manifests to report.html and summary.json
export*.py            a run handed over: adapter, card, data, merged weights
cli*.py               the command line
launch.py             a run from its config to its end
inputs.py             its model and pool, checked before anything expensive
presets/              configs that run by name
"""
