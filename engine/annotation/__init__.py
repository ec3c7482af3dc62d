"""Annotators of a run.

annotators.py  makes the annotator, the judge and the knowledge writer that a config names
context.py     what they may need of the run
teachers.py    a teacher with its journal and its cap on money
human.py       people: their tasks and answers in the run directory
page.py        the page on which they answer
queue.py       which browser has which question
answers.py     their answers on disk
"""
