"""Fixtures shared by all tests. Engines and Ray start once a test session, since a start costs many seconds."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tiny_models import build_tiny_model
from worker_forks import forked_workers

#: No example has a deadline, since that would assert an absolute time; and a failure comes again on the next run.
settings.register_profile("ka2l", deadline=None, derandomize=True)
settings.load_profile("ka2l")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
#: Models are tiny: a second thread only waits, and where others use the cores it takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def load_beside(name: str) -> Any:
    """The module of that name in this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with public question sets and published vectors; tests that read it skip where it is absent."""
    path = Path(os.environ.get("KA2L_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no shared data folder at {path}; set KA2L_SHARED to one")
    return path


@pytest.fixture(scope="session")
def teacher_module() -> Any:
    """The module teacher_server.py."""
    return load_beside("teacher_server")


@pytest.fixture
def teacher_server(teacher_module: Any) -> Iterator[Callable[..., Any]]:
    """Starts servers, see teacher_server.py; they end with the test."""
    with ExitStack() as servers:
        yield lambda *args, **options: servers.enter_context(teacher_module.TeacherServer(*args, **options))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need it; its workers start as forks, see tests/helpers/worker_forks.py."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # as where `ka2l` starts Ray
    import ray

    with forked_workers():
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Architecture name -> folder of a tiny random model with its tokenizer; see tests/helpers/tiny_models.py."""
    folder = tmp_path_factory.mktemp("tiny_models")

    built: dict[str, Path] = {}

    def build(name: str, **overrides: Any) -> Path:
        """``overrides`` are fields of the model's config."""
        key = repr((name, sorted(overrides.items())))
        if key not in built:
            built[key] = build_tiny_model(name, folder / f"{name}-{len(built)}", **overrides)
        return built[key]

    return build
