"""Services that the cells of a benchmark share: the model that compares answers, a local teacher."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from actors.workers.leases import Leases
from actors.workers.shared import Service, SharedEquivalence, SharedWorkers, joined
from engine import build
from engine.store.manifest import fingerprint
from engine.store.stage_folder import Stage
from ka2l.answers.equivalence import Equivalence

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign

#: Cores of the service, and of a stage's worker that asks it: together no more than a worker with a model of its own.
_SERVICE_CPUS, ASKING_CPUS = 0.75, 0.25


@contextlib.contextmanager
def shared_equivalence(campaign: Campaign, stage: Stage) -> Iterator[tuple[Equivalence | None, float, float]]:
    """An equivalence that all cells ask, and the cores and GPUs that a worker needs with it; None where it needs no
    model, or the run is alone."""
    config = campaign.config.equivalence
    if campaign.leases is None or config.kind == "lexical" or config.endpoint is not None:
        yield None, 1.0, config.gpus
        return
    service = Service(
        key=fingerprint(kind="equivalence", **config.result_fields()),
        make_host=partial(build.equivalence_host, config),
        cpus=_SERVICE_CPUS,
        gpus=config.gpus,
        deadline_s=campaign.config.faults.deadline_s,
        log_path=campaign.log_path(stage),
    )
    with joined(campaign.leases, service) as worker:
        yield SharedEquivalence(worker), ASKING_CPUS, 0.0


def shared_teacher(campaign: Campaign, stage: Stage) -> SharedWorkers | None:
    """The workers of a local teacher that all cells ask; None where the run is alone, or has no such teacher."""
    config = campaign.config.annotator
    if campaign.leases is None or config.kind != "local_teacher":
        return None
    key = fingerprint(kind="teacher", **config.result_fields())
    services = [
        Service(
            key=f"{key}-{index}",
            make_host=partial(build.teacher_host, config),
            cpus=config.engine.cpus_per_replica,
            gpus=config.engine.gpus_per_replica,
            deadline_s=campaign.config.faults.deadline_s,
            log_path=campaign.log_path(stage),
        )
        for index in range(config.engine.replicas)
    ]
    return SharedWorkers(campaign.leases, services, campaign.config.faults)


#: How a cell's process is told where to ask for workers.
LEASES_VARIABLE = "KA2L_LEASES"


def leases_from(text: str | None) -> tuple[Leases | None, float]:
    """What `LEASES_VARIABLE` says: the way to the queue, and the slice in seconds. Ray must be initialised."""
    if not text:
        return None, float("inf")
    said = json.loads(text)
    return Leases(said["name"], said["cell"], said["priority"]), float(said["slice_s"])
