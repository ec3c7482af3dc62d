"""``python -m engine.cli`` is the command ``ka2l``."""

from engine.cli.main import main

main()
