"""Seeds of each row's random numbers. They do not depend on which worker makes the row."""

from __future__ import annotations

import hashlib


def row_seed(run_seed: int, round_index: int, stage: str, question_id: str, sample_index: int = 0) -> int:
    """A seed in [0, 2**31) from (run seed, round, stage, question id, sample index).

    31 bits, because vLLM adds the sample's index to a request's seed and numpy takes 32-bit seeds.
    """
    key = f"{run_seed}\x1f{round_index}\x1f{stage}\x1f{question_id}\x1f{sample_index}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (2**31)
