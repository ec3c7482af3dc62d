from __future__ import annotations

from pathlib import Path

from engine.stages.choosing import batch_size
from engine.store.run_directory import RunDirectory


def test_a_resumed_stage_keeps_the_batches_that_it_began_with(tmp_path: Path) -> None:
    """Switching to the Batch API or to other replicas in mid-stage must not change which questions a shard is for."""
    stage = RunDirectory(tmp_path).stage("annotate", 0)
    assert batch_size(stage, 64) == 64
    assert batch_size(RunDirectory(tmp_path).stage("annotate", 0), 2**31) == 64
    stage.remove()
    assert batch_size(stage, 256) == 256
