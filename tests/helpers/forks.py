"""What processes share that are forks of one which has imported the libraries, most of what a short one takes."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn
from unittest import mock


def import_ray(modules: Iterable[str]) -> None:
    """Import modules that import Ray, without a draw from Ray's random numbers.

    Ray draws an id for every actor class that a module defines. What has been drawn from before a fork gives every
    fork the same ids after it: two workers that start at once then collide in the object store, one dies, and
    `ray.init`, which waits for both, never returns.
    """
    import ray.actor

    ids = ray.actor.ActorClassID
    drawn = mock.Mock(wraps=ids, from_random=lambda: ids(os.urandom(ids.size())))
    with mock.patch.object(ray.actor, "ActorClassID", drawn):
        for name in modules:
            importlib.import_module(name)


def end_with(body: Callable[[], None], *, exit_functions: bool) -> NoReturn:
    """Run ``body`` and end this fork as Python ends a process, with the exit code of what ``body`` raised.

    Args:
        exit_functions: call those of `atexit` that the fork and the process before it have registered.
    """
    code = 1
    try:
        body()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        if exit_functions:
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
