"""Questions: where they are read from, which rows are usable, how they are split.

config.py   which pool, and which of its columns
sources.py  file formats and data sets: JSON Lines, Parquet, Hugging Face; add a format here
rows.py     one row: cleaned, or set aside with a reason
splits.py   duplicates, and the seeded splits
"""
