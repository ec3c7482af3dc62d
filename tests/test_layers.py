"""The layer rule: ka2l <- actors <- engine; Ray, vLLM and the environment stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("ka2l", "actors", "engine")
MODULES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
NAMES = [str(path.relative_to(REPOSITORY)) for path in MODULES]


class Source(NamedTuple):
    name: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.split("/", 1)[0]

    def imports(self) -> set[str]:
        """Top-level packages that the module imports, anywhere in it."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and _dotted(node.func) in ("importlib.import_module", "__import__"):
                found |= {str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant)}
        return found

    def calls(self) -> Iterator[ast.Call]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))

    def names(self) -> set[str]:
        """Every dotted name that the module mentions."""
        return {_dotted(node) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute | ast.Name)}


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.fixture(params=MODULES, ids=NAMES)
def source(request: pytest.FixtureRequest) -> Source:
    path: Path = request.param
    return Source(str(path.relative_to(REPOSITORY)), ast.parse(path.read_text(encoding="utf-8")))


def test_all_three_packages_are_looked_at() -> None:
    for package in PACKAGES:
        assert sum(name.startswith(f"{package}/") for name in NAMES) > 3


def test_a_module_imports_only_from_its_own_layer_and_below(source: Source) -> None:
    forbidden = {"ka2l": {"actors", "engine"}, "actors": {"engine"}, "engine": set()}[source.package]
    assert not source.imports() & (forbidden | {"tests", "benchmarks", "cluster"})


def test_the_method_knows_neither_ray_nor_vllm_nor_the_environment(source: Source) -> None:
    if source.package != "ka2l":
        pytest.skip("a rule for ka2l/")
    assert not source.imports() & {"ray", "vllm"}
    read = {name for name in source.names() if name.startswith(("os.environ", "os.getenv", "environ", "getenv"))}
    assert not read


def test_vllm_is_imported_in_the_sampler_alone_and_inside_functions(source: Source) -> None:
    if source.name != "actors/sampler.py":
        assert "vllm" not in source.imports()
        return
    assert "vllm" in source.imports()
    at_top = Source(
        source.name, ast.Module([n for n in source.tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    )
    assert "vllm" not in at_top.imports()


def test_in_the_engine_only_stages_and_the_command_line_import_ray(source: Source) -> None:
    if source.package == "engine" and source.name not in ("engine/stages.py", "engine/cli.py"):
        assert "ray" not in source.imports()


def test_nothing_is_pickled_and_no_foreign_code_is_run_unasked(source: Source) -> None:
    assert not source.imports() & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not source.names() & {"torch.load", "torch.save"}
    for call in source.calls():
        for keyword in call.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle"):
                assert not (isinstance(keyword.value, ast.Constant) and keyword.value.value is True), (
                    f"{source.name}:{call.lineno}"
                )


def test_only_the_command_line_prints(source: Source) -> None:
    if source.name != "engine/cli.py":
        assert not [call.lineno for call in source.calls() if _dotted(call.func) == "print"]


def test_every_module_says_what_it_is(source: Source) -> None:
    assert source.name.endswith("__init__.py") or ast.get_docstring(source.tree)
