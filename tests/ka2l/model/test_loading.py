"""A hub model is loaded at the revision that the config names, by whoever loads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ka2l.model.loading import ModelConfig, split_source

REVISIONS = {"old": "1" * 40, "new": "2" * 40}
LOAD = """
import json
from ka2l.knowledge.hidden_states import ExtractionConfig, HiddenStateExtractor
from ka2l.model.loading import ModelConfig, load_causal_lm, load_tokenizer
from ka2l.model.sizing import model_needs

found = {}
for revision in ("old", "new"):
    model = ModelConfig(path="org/tiny", revision=revision)
    loaded = load_causal_lm(model.source)
    load_tokenizer(model)
    extractor = HiddenStateExtractor(model.source, ExtractionConfig(device="cpu"))
    layers = [loaded.config.num_hidden_layers, extractor.decoder.config.num_hidden_layers]
    found[revision] = {"layers": layers, "num_parameters": model_needs(model.source).num_parameters}
print(json.dumps(found))
"""


@pytest.fixture
def hub_home(tiny_models: Callable[..., Path], tmp_path: Path) -> Path:
    """A hub cache with two revisions of ``org/tiny``: of one layer, and of three."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for (name, commit), num_layers in zip(REVISIONS.items(), (1, 3), strict=True):
        shutil.copytree(tiny_models("llama-2", num_hidden_layers=num_layers), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return tmp_path


@pytest.mark.slow
def test_weights_tokenizer_states_and_size_are_those_of_the_revision(hub_home: Path) -> None:
    environment = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["old"]["layers"] == [1, 1]
    assert found["new"]["layers"] == [3, 3]
    assert found["old"]["num_parameters"] < found["new"]["num_parameters"]


def test_a_source_says_folder_or_hub_id_and_revision(tmp_path: Path) -> None:
    assert split_source(ModelConfig(path="org/tiny", revision="refs/pr/1").source) == ("org/tiny", "refs/pr/1")
    assert split_source(ModelConfig(path="org/tiny").source) == ("org/tiny", None)
    folder = tmp_path / "tiny@home"
    folder.mkdir()
    assert split_source(ModelConfig(path=str(folder), revision="main").source) == (str(folder), None)
    assert split_source(str(tmp_path / "none@home")) == (str(tmp_path / "none@home"), None)
