"""What linters cannot see of the packages: their maps are complete, and no foreign code is run unasked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("ka2l", "actors", "engine")
FOLDERS = sorted(path.parent for package in PACKAGES for path in (REPOSITORY / package).rglob("__init__.py"))
#: Configs and templates are named by their files.
MAPPED = [folder for folder in FOLDERS if folder.name not in ("presets", "templates")]


@pytest.mark.parametrize("folder", MAPPED, ids=[str(folder.relative_to(REPOSITORY)) for folder in MAPPED])
def test_a_package_says_what_each_of_its_modules_is_for(folder: Path) -> None:
    modules = {path.name for path in folder.glob("*.py") if not path.name.startswith("__")}
    rooms = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = {words[0] for line in text.splitlines() if len(words := line.split()) > 1 and words[0][-3:] == ".py"}
    assert named == modules
    assert all(f"\n{room}" in text for room in rooms)


def test_no_foreign_code_is_run_and_no_pickle_allowed_unasked() -> None:
    found = []
    for path in (path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                found += [f"{path}:{node.lineno}"] if isinstance(node.value, ast.Constant) and node.value.value else []
    assert not found
