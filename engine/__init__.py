"""The loop and everything that a user meets. Start reading at loop.py.

loop.py      the active-learning loop
stopping.py  when a run has reached its end
config.py    RunConfig, presets, --set
build.py     ``kind:`` in a config to an object
launch.py    a run from its config to its end
inputs.py    model and pool, checked before anything expensive
progress.py  a live bar, or a line every half minute
stages/      the stages, declared, in their order
execution/   how a stage is skipped, made, measured and committed
store/       the run directory: shards, manifests, journal, ledger
annotation/  annotators of a run: people's page, teachers
forecast/    ``ka2l estimate``
report/      report.html and summary.json
export/      ``ka2l export``
benchmark/   ``ka2l benchmark``: many runs at once
cli/         the command line
presets/     configs that run by name
templates/   HTML and Markdown of pages and cards
"""
