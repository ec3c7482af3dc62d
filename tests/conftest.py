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

#: No example has a deadline, since that would assert an absolute time; and a failure comes again on the next run.
settings.register_profile("ka2l", deadline=None, derandomize=True)
settings.load_profile("ka2l")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
    path = Path(__file__).with_name("teacher_server.py")
    spec = importlib.util.spec_from_file_location("teacher_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["teacher_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def teacher_server(teacher_module: Any) -> Iterator[Callable[..., Any]]:
    """Starts servers, see teacher_server.py; they end with the test."""
    with ExitStack() as servers:
        yield lambda *args, **options: servers.enter_context(teacher_module.TeacherServer(*args, **options))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Architecture name -> folder of a tiny random model with its tokenizer; see tests/models.py."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("models.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tiny_models")

    built: dict[str, Path] = {}

    def build(name: str, **overrides: Any) -> Path:
        """``overrides`` are fields of the model's config."""
        key = repr((name, sorted(overrides.items())))
        if key not in built:
            built[key] = module.build_tiny_model(name, folder / f"{name}-{len(built)}", **overrides)
        return built[key]

    return build
