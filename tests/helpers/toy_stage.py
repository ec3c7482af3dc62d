"""A stage of one's own, as `CONTRIBUTING.md` shows it: counts the words of the selected questions."""

from __future__ import annotations

import pyarrow as pa

from engine.execution.campaign import Campaign
from engine.stages.kind import Outcome, Room, Work, declare
from engine.store.shards import shard_name, write_shard
from engine.store.stage_folder import Stage


@declare("probing", room=lambda config: Room(2.0, 0.0))
def count_words(campaign: Campaign, round_index: int) -> Work:
    """Words of every question, to be read by whoever is curious."""
    questions = campaign.stage("questions")

    def work(stage: Stage) -> Outcome:
        asked = questions.table(["question_id", "question"])
        counts = [len(text.split()) for text in asked["question"].to_pylist()]
        write_shard(stage.url, shard_name(0), pa.table({"question_id": asked["question_id"], "words": counts}), {})
        return {"num_words": sum(counts)}, {"tokens_prompt": float(sum(counts))}

    return Work({}, [questions], work)
