"""What is measured.

config.py        EvaluationConfig
statistics.py    exact match, F1, AUROC with intervals, forgetting
text_metrics.py  METEOR, ROUGE-L, BERTScore
facts.py         facts that are right, wrong and missing in long answers
judge.py         a language model as judge
reliability.py   calibration and abstention
"""
