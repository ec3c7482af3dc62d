"""Do two answers mean the same?

normalise.py    words, numbers and dates of an answer
lexical.py      two answers compared by them
equivalence.py  two answers compared by rules, an NLI model, embeddings or a judge
clustering.py   answers grouped by meaning
grading.py      answers compared with accepted answers
"""
