"""The layer rule: ka2l <- actors <- engine; Ray, vLLM and the environment stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("ka2l", "actors", "engine")
MODULES = sorted(
    path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py") if path.name != "__init__.py"
)
#: What no package imports: these are not installed with them.
NEVER = ("tests", "benchmarks", "cluster")


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


SOURCES = [Source(str(path.relative_to(REPOSITORY)), ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES]


def each(*packages: str, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Runs a test for every module of some packages."""
    chosen = [source for source in SOURCES if source.package in packages and source.name not in but]
    return pytest.mark.parametrize("source", chosen, ids=[source.name for source in chosen])


def test_all_three_packages_are_looked_at() -> None:
    for package in PACKAGES:
        assert sum(source.package == package for source in SOURCES) > 3


@each("ka2l")
def test_the_method_imports_neither_hosts_nor_engine_nor_what_they_run_on(source: Source) -> None:
    assert not source.imports() & {"actors", "engine", "ray", "vllm", *NEVER}


@each("ka2l")
def test_the_method_reads_no_environment_variable(source: Source) -> None:
    names = {name for name in source.names() if name.split(".")[0] in ("os", "environ", "getenv")}
    assert not [name for name in names if "env" in name]


@each("actors")
def test_hosts_do_not_import_the_engine(source: Source) -> None:
    assert not source.imports() & {"engine", *NEVER}


@each("engine", but=("engine/cluster.py",))
def test_in_the_engine_one_module_imports_ray(source: Source) -> None:
    assert not source.imports() & {"ray", *NEVER}


@each(*PACKAGES, but=("actors/sampler.py",))
def test_vllm_is_imported_in_the_sampler_alone(source: Source) -> None:
    assert "vllm" not in source.imports()


def test_the_sampler_imports_vllm_inside_functions() -> None:
    source = next(source for source in SOURCES if source.name == "actors/sampler.py")
    at_top = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "vllm" in source.imports()
    assert "vllm" not in Source(source.name, ast.Module(at_top, [])).imports()


@each(*PACKAGES)
def test_nothing_is_pickled(source: Source) -> None:
    assert not source.imports() & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not source.names() & {"torch.load", "torch.save"}


@each(*PACKAGES)
def test_no_foreign_code_is_run_unasked(source: Source) -> None:
    asked = [keyword for call in source.calls() for keyword in call.keywords]
    for keyword in asked:
        if keyword.arg in ("trust_remote_code", "allow_pickle"):
            assert not (isinstance(keyword.value, ast.Constant) and keyword.value.value), f"line {keyword.lineno}"


@each(*PACKAGES)
def test_nothing_prints_past_the_console(source: Source) -> None:
    assert not [call.lineno for call in source.calls() if _dotted(call.func) == "print"]


@each(*PACKAGES)
def test_every_module_says_what_it_is(source: Source) -> None:
    assert ast.get_docstring(source.tree)
