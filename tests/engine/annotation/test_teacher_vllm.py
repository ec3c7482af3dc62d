"""Teachers on a real engine: behind vLLM's OpenAI-compatible server, and in the run's own workers.

The teacher is a tiny model that was taught what to answer to four kinds of question; vLLM holds it to the JSON schema.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from journals import Memory

from engine.store.run_directory import RunDirectory
from ka2l.annotation.by_teacher import TeacherAnnotator
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.errors import ConfigError
from ka2l.model.loading import ModelConfig, load_causal_lm, load_tokenizer, model_name
from ka2l.prompts import encode_messages, teacher_messages
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.endpoint import Teacher

pytestmark = [pytest.mark.slow, pytest.mark.whole]
#: What the teacher knows of each kind of question; of colours it knows nothing.
KNOWN = {"size": ["large", "big"], "colour": [], "taste": ["sour"], "name": ["Ann"]}
KEY = "sk-local-secret"
NUM_STEPS = 150


def question(kind: str, number: int) -> str:
    return f"What is the {kind} of thing {number}?"


@pytest.fixture(scope="module")
def teacher_model(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers that answers as KNOWN says."""
    import torch

    untaught, folder = tiny_models("llama-2", num_hidden_layers=2), tmp_path_factory.mktemp("teacher")
    tokenizer = load_tokenizer(ModelConfig(path=str(untaught)))
    model: Any = load_causal_lm(str(untaught), "float32").train()
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        rows = []
        for kind, answers in KNOWN.items():
            prompt = encode_messages(tokenizer, teacher_messages(question(kind, draw.randrange(40))))
            reply = json.dumps({"answers": answers, "abstain": not answers}) + tokenizer.eos_token
            rows.append((prompt, tokenizer(reply, add_special_tokens=False)["input_ids"]))
        width = max(len(prompt) + len(reply) for prompt, reply in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        for row, (prompt, reply) in enumerate(rows):
            ids[row, : len(prompt) + len(reply)] = torch.tensor([*prompt, *reply])
            labels[row, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
        loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert loss < 0.01, "the teacher has not learnt its answers"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- behind a server -------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server(teacher_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's own server on this machine's loopback, with a key; it and all its processes end with these tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--model", teacher_model, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
    words += ["--api-key", KEY, "--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            env=os.environ | environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine is a process of its own: both are found by their group
        )
    try:
        deadline = time.monotonic() + 400
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Server(f"http://127.0.0.1:{port}/v1", process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def annotator(server: Server, journal: Memory, key: str = KEY, **fields: Any) -> TeacherAnnotator:
    prices = {"input_per_million": 1.0, "output_per_million": 2.0}
    values = {"base_url": server.url, "model": "tiny", "max_tokens": 64, "backoff_base_s": 0.0, "prices": prices}
    config = TeacherConfig.model_validate(values | fields)
    return TeacherAnnotator(config, Teacher(config, key, journal).ask, LexicalEquivalence())


def test_a_real_server_is_held_to_the_schema_its_usage_is_booked_and_its_refusals_are_kept(
    server: Server, teacher_model: Path
) -> None:
    asked = {kind: question(kind, 7) for kind in KNOWN} | {"long": "Why? " * 1000, "again": question("name", 7)}
    journal = Memory()
    teacher = annotator(server, journal, num_samples=3, temperature=0.3)
    made = {row.question_id: row for row in teacher.annotate(asked)}
    assert {name: row.answers for name, row in made.items()} == {
        "size": ["large", "big"],
        "taste": ["sour"],
        "name": ["Ann"],
        "again": ["Ann"],
    }
    assert teacher.refusals["colour"].reason == "the teacher abstained"
    assert "maximum context length is 1024 tokens" in teacher.refusals["long"].reason
    assert teacher.refusals["long"].cost == 0

    tokenizer = load_tokenizer(ModelConfig(path=str(teacher_model)))
    prompt_tokens = {kind: len(encode_messages(tokenizer, teacher_messages(asked[kind]))) for kind in KNOWN}
    used = teacher.usage
    assert used.num_prompt_tokens == 3 * sum(prompt_tokens.values())
    assert used.cost == pytest.approx((used.num_prompt_tokens + 2 * used.num_completion_tokens) / 1e6)
    assert sum(row.cost for row in made.values()) + teacher.cost_refused == pytest.approx(used.cost)
    assert made["again"].cost == 0

    # The server is not needed for what the journal holds, the refusal included.
    away = server._replace(url="http://127.0.0.1:9/v1")
    again = annotator(away, journal, num_samples=3, temperature=0.3)
    assert {row.question_id: row for row in again.annotate(asked)} == made
    assert again.refusals == teacher.refusals


def test_replies_that_a_real_server_cuts_off_are_asked_again_paid_and_refused(server: Server) -> None:
    teacher = annotator(server, Memory(), max_tokens=4, temperature=1.0, max_malformed=1)
    assert teacher.annotate({"a": question("size", 1)}) == []
    assert teacher.refusals["a"].reason == "2 unusable replies, the last cut off at max_tokens"
    assert teacher.usage.num_completion_tokens == 2 * 4
    assert teacher.refusals["a"].cost > 0


def test_a_real_server_that_stands_still_for_a_while_is_asked_again(server: Server) -> None:
    teacher = annotator(server, Memory(), timeout_s=0.5, max_retries=200)
    os.killpg(server.process.pid, signal.SIGSTOP)
    going_on = threading.Timer(1.5, os.killpg, (server.process.pid, signal.SIGCONT))
    going_on.start()
    try:
        made = teacher.annotate({"a": question("taste", 3)})
    finally:
        going_on.join()
    assert [row.answers for row in made] == [["sour"]]


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"key": "sk-wrong"}, "refuses the API key"), ({"model": "huge"}, "knows no model 'huge'")],
)
def test_what_a_real_server_will_never_answer_stops_at_once(server: Server, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        annotator(server, Memory(), **fields).annotate({"a": question("size", 1)})
    assert "sk-" not in str(raised.value)


# --- in the run's own workers ----------------------------------------------------------------------------------------


def test_a_campaign_is_annotated_by_a_local_teacher_and_nothing_is_generated_twice(
    selected: Path, teacher_model: Path, ka2l: Any, on_cluster: list[str]
) -> None:
    teacher = {"model": str(teacher_model), "num_samples": 2, "temperature": 0.3, "max_tokens": 64}
    engine = {"kind": "vllm", "cpus_per_replica": 1.8, "max_num_seqs": 32}
    values = {"rounds": 1, "annotator.kind": "local_teacher", "annotator.teacher": teacher, "annotator.engine": engine}
    options = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    kill = {"event": "stage_committed", "stage": "annotate"}
    ended = ka2l("resume", selected, *options, *on_cluster, kill=kill)
    stage = RunDirectory(selected).stage("annotate", 0)
    assert stage.manifest() is not None, ended.stderr
    rows, manifest = stage.table().to_pylist(), stage.require()
    kinds = {row["question_id"]: row["question"].split()[3] for row in rows}
    assert {row["question_id"]: row["answers"] for row in rows} == {name: KNOWN[kind] for name, kind in kinds.items()}
    assert {(row["annotator"], row["cost"]) for row in rows} == {(model_name(str(teacher_model)), 0.0)}
    assert all(row["prompt_sha256"] for row in rows)
    num_refused = 12 - len(rows)
    assert num_refused > 0
    assert manifest.metrics["refused"] == {"the teacher abstained": num_refused}
    assert manifest.cost["money"] == 0

    journal = [json.loads(line)["record"] for line in (selected / "teacher.jsonl").read_text().splitlines()]
    assert len(journal) == 12 * 2
    for item, name in (("tokens_prompt", "num_prompt_tokens"), ("tokens_generated", "num_completion_tokens")):
        assert manifest.cost[item] == sum(record[name] for record in journal) > 0

    # Made again from the journal: no engine is started.
    log = selected / "logs" / "round-000-annotate.log"
    chatter = log.read_bytes()
    assert chatter
    ka2l("resume", selected, "--redo-from", "annotate", *on_cluster, kill=kill)
    again = RunDirectory(selected).stage("annotate", 0)
    assert again.table().to_pylist() == rows
    assert len((selected / "teacher.jsonl").read_text().splitlines()) == len(journal)
    assert log.read_bytes() == chatter
