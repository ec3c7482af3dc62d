"""Benchmarks run seldom: what they take from the packages is there, and their files compile."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "benchmarks").rglob("*.py"))
PACKAGES = ("ka2l", "actors", "engine")


def taken(script: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a script imports from the packages, at its top or within a function."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.relative_to(REPOSITORY / "benchmarks").as_posix())
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    for module, name in taken(script):
        found = importlib.import_module(module)
        if not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")  # a module of a package
