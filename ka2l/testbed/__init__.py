"""A model whose knowledge is known exactly.

build.py  TestbedConfig; a testbed built, cached or taken from weights/
world.py  its people and facts
facts.py  the facts of a file instead
lives.py  whole lives, for long answers
model.py  tokenizer and training
weights/  the testbeds of the presets, trained
"""
