"""The command line.

main.py       ``ka2l`` and most commands
benchmark.py  ``ka2l benchmark``
annotate.py   ``ka2l annotate``
testbed.py    ``ka2l testbed``
options.py    options that commands share
"""
