"""Every error KA2L raises on purpose, as one tree. Each message says what is wrong, where, and what to do.

```
KA2LError
├── UserError                    exit code 2: the user must change something
│   ├── ConfigError              a key, a value or a preset
│   ├── PoolError                the question pool: missing, unreadable, no usable row
│   ├── ModelError               a model or adapter directory, LoRA target modules
│   ├── RunDirectoryError        a run directory
│   │   ├── RunInUseError        another process holds it
│   │   ├── StaleStageError      a committed stage was made with another config
│   │   ├── DamagedShardError    a committed file's checksum differs
│   │   └── StorageFullError     no space left where the run writes
│   ├── BudgetError              a budget larger than what there is to select
│   └── AnnotationError          annotations that cannot be used
├── AnnotationsPending           exit code 3: the run is paused until annotations arrive
└── EngineError                  exit code 1: a fault of ours or of the machine
    ├── CanaryError              an adapter that changes nothing, or engines that disagree about it
    ├── StageFailedError         a stage failed; carries the last lines of its log
    │   ├── StageStalledError    its workers were lost or got stuck, again and again
    │   └── TooManyFailuresError more of its questions failed than the config allows
    ├── StorageError             the storage failed, again and again
    └── ResourcesBusyError       CPUs, GPUs or memory not given back in time
```
"""

from __future__ import annotations


class KA2LError(Exception):
    """Base of all errors raised by KA2L on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders inside Ray; keep the hint on the way.
        return (_rebuild, (type(self), self.message, self.hint))

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """What an error says, in one line; ``otherwise``, or the name of its class, where it says nothing."""
    return (str(error).strip() or otherwise or type(error).__name__).splitlines()[0]


def _rebuild(cls: type[KA2LError], message: str, hint: str | None) -> KA2LError:
    return cls(message, hint=hint)


class UserError(KA2LError):
    """The user must change something before the run can go on."""

    exit_code = 2


class ConfigError(UserError):
    """A config key, value, file or preset is wrong."""


class PoolError(UserError):
    """The question pool is missing, unreadable or holds no usable row."""


class ModelError(UserError):
    """A model or adapter directory cannot be used as asked."""


class RunDirectoryError(UserError):
    """A run directory cannot be used as asked."""


class RunInUseError(RunDirectoryError):
    """Another process works in the run directory."""


class StaleStageError(RunDirectoryError):
    """A stage was committed with another config than the one given now."""


class DamagedShardError(RunDirectoryError):
    """A committed file does not have the size or checksum its manifest states."""


class StorageFullError(RunDirectoryError):
    """No space is left on the device that holds the run directory."""


class BudgetError(UserError):
    """The budget asks for more questions than the pool can give."""


class AnnotationError(UserError):
    """Annotations are missing, empty or contradictory."""


class AnnotationsPending(KA2LError):  # noqa: N818 - a state of the run, not a mishap
    """The run waits for annotations; it goes on with ``ka2l resume`` once they are there."""

    exit_code = 3


class HoursUsedUp(KA2LError):  # noqa: N818 - a state of the run, not a mishap
    """The cap on the run's hours is reached: the run ends here, and goes on with a larger one."""

    exit_code = 0


class EngineError(KA2LError):
    """Something failed that the user did not cause."""


class CanaryError(EngineError):
    """After tuning, the adapter changes nothing or two engines disagree about what it does."""


class StageFailedError(EngineError):
    """A stage failed; the message carries the last lines of the log."""


class StageStalledError(StageFailedError):
    """The workers of a stage were lost or stopped getting on; raised once replacing them has not helped."""


class TooManyFailuresError(StageFailedError):
    """More questions of a stage failed than ``faults.max_failed_share`` allows."""


class StorageError(EngineError):
    """The storage of the run directory failed, each time it was tried again."""


class ResourcesBusyError(EngineError):
    """The resources a stage needs were not given back in time."""
