"""The run directory.

run_directory.py  its folders, and the files at its top
stage_folder.py   one stage: written, committed, verified, removed
shards.py         Parquet files with their costs and failures
manifest.py       what a stage holds and what it was made from; fingerprints
storage.py        local disks and URLs: whole or absent, with retries
journal.py        a teacher's replies, on disk before they are used
ledger.py         what was spent
events.py         events.jsonl and what the console says
"""
