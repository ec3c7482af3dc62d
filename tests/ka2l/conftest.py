"""A teacher to ask, and what it takes to be killed while asking."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest


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
