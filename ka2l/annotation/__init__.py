"""Who answers.

annotator.py        AnnotatorConfig, and the pool's own answers as annotator
by_teacher.py       a teacher: samples that agree
people.py           answers of several people to one question, joined
task_files.py       their files: JSON Lines, CSV, Label Studio
task_cells.py       one cell of such a file
reference_table.py  answers to questions that the pool does not hold
"""
