"""Query strategies.

strategies.py  every strategy by name, and SelectionConfig
diversity.py   strategies that spread over hidden states
candidates.py  what a strategy is given and returns
"""
