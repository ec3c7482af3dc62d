"""What a run will take: ``ka2l estimate``.

estimate.py    counts from the config, times rates from the warm-up
warm_up.py     the real stages on some hundred questions
rates.py       rates with intervals
prediction.py  the prediction, as table and JSON
prices.py      PricesConfig: what annotations, CPU- and GPU-hours are worth
"""
