"""Hidden-state inversion: the state of an unknown question to a new question.

config.py    DecoderConfig
inverter.py  the model that reads a state and writes a question
training.py  its fit, and how well it reads
gates.py     variants of states, and the checks that a decoded question must pass
"""
