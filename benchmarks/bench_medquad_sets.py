"""Are all rows accounted for when a real teacher takes long medical answers apart, and often gets it wrong?

Both training sets of KnowTuning are built of 200 rows of MedQuAD with vLLM's own server on this machine as teacher. The
teacher is a tiny model that was taught the form of the replies on a few short prompts and nothing else: its text is
nonsense, many of its lists have a wrong length, some answers are longer than it can read, and the path is that of any
teacher. Every answer must end in facts or in the quarantine, every pair in the sets or in the quarantine, and a second
pass must ask for nothing.

    python benchmarks/bench_medquad_sets.py ../shared/data/medquad.jsonl

Takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from machine import write_result

from engine.store.journal import FileJournal
from ka2l.knowledge.perplexity import PerplexityScorer, fact_tokens
from ka2l.model.loading import ModelConfig, load_causal_lm, load_tokenizer
from ka2l.prompts import encode_messages
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.endpoint import Teacher
from ka2l.teacher.request import TeacherPrompt
from ka2l.tuning.knowledge_writer import Extract, Rephrase, Revise, Rewrite, Task, TeacherWriter, task_prompt
from ka2l.tuning.knowtuning import KnownFacts, KnowTuningConfig, augment, extract_facts, parts_of

#: Tokens that the teacher reads at most: a few answers are longer and are refused by the server.
CONTEXT = 4096
NUM_STEPS = 200


def lessons(draw: random.Random) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Tasks on short nonsense with replies of the right form."""
    words = ["fever", "pain", "blood", "skin", "bone", "sleep", "heart", "water"]
    while True:
        facts = [f"{draw.choice(words)} {draw.choice(words)}" for _ in range(draw.randrange(2, 5))]
        question, answer = f"What is {draw.choice(words)}?", ". ".join(facts)
        yield Extract(question, answer), {"facts": facts}
        yield Revise(question, facts), {"facts": [f"no {fact}" for fact in facts]}
        yield Rewrite(question, facts), {"question": question, "answer": answer}
        yield Rephrase(question, facts), {"answer": answer}


def teach(folder: Path) -> Path:
    """A model of two layers that answers in the right form, saved in a new folder."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from models import build_tiny_model

    untaught = build_tiny_model("llama-2", folder / "untaught", num_hidden_layers=2, max_position_embeddings=CONTEXT)
    tokenizer = load_tokenizer(ModelConfig(path=str(untaught)))
    model: Any = load_causal_lm(str(untaught), "float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=NUM_STEPS)
    lesson = lessons(random.Random(0))
    for _ in range(NUM_STEPS):
        rows = []
        for _ in range(8):
            task, reply = next(lesson)
            prompt = encode_messages(tokenizer, task_prompt(task).messages)
            text = json.dumps(reply) + tokenizer.eos_token
            rows.append((prompt, tokenizer(text, add_special_tokens=False)["input_ids"]))
        width = max(len(prompt) + len(reply) for prompt, reply in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        for row, (prompt, reply_ids) in enumerate(rows):
            ids[row, : len(prompt) + len(reply_ids)] = torch.tensor([*prompt, *reply_ids])
            labels[row, len(prompt) : len(prompt) + len(reply_ids)] = torch.tensor(reply_ids)
        loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"teacher taught: loss {loss.item():.2f} nats a token", flush=True)
    model.save_pretrained(folder / "teacher")
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder / "teacher")
    return folder / "teacher"


@contextlib.contextmanager
def serve(model: Path, log: Path) -> Iterator[str]:
    """vLLM's server on loopback; yields the address of its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", model, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", CONTEXT]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            env=os.environ | environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            if process.poll() is not None:
                raise SystemExit(log.read_text()[-3000:])
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


class Counting:
    """Asks a teacher and says how far it is.

    Attributes:
        num_requests: that were sent.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.num_requests = 0

    def ask(self, prompts: Mapping[str, TeacherPrompt]) -> Any:
        """See `ka2l.teacher.endpoint.Teacher.ask`."""
        began = time.monotonic()
        run = self.teacher.ask(prompts)
        self.num_requests += run.num_requests
        print(f"{len(prompts):6,} prompts in {time.monotonic() - began:6.1f} s", flush=True)
        return run


def build_sets(answers: Mapping[str, tuple[str, str]], model: Path, asked: Counting, config: TeacherConfig) -> Any:
    """Both sets, and what could not be made of the answers."""
    writer = TeacherWriter(config, asked.ask)
    facts, refused = extract_facts(answers, writer)
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    texts = [fact_tokens(tokenizer, fact) for name in facts for fact in facts[name]]
    found = iter(PerplexityScorer(str(model), "float32").perplexities(texts).tolist())
    known = [KnownFacts(name, *answers[name], facts[name], [next(found) for _ in facts[name]]) for name in facts]
    return known, refused, augment(known, KnowTuningConfig(), writer, seed=0), writer.usage


def digest(answers: Mapping[str, tuple[str, str]], known: Any, refused: Any, made: Any) -> dict[str, Any]:
    """Figures, after a check that every answer and every pair is accounted for."""
    assert sorted([row.question_id for row in known] + list(refused)) == sorted(answers)
    wanted = Counter(part for row in known for part in parts_of(KnowTuningConfig(), len(row.facts)))
    pairs, unmade = Counter(pair.part for pair in made.pairs), Counter(part for _, part, _ in made.refusals)
    assert wanted == pairs + unmade
    assert all(reason for reason in [*refused.values(), *(row[2] for row in made.refusals)])
    return {
        "num_answers": len(answers),
        "num_taken_apart": len(known),
        "num_facts": sum(len(row.facts) for row in known),
        "answers_refused": dict(Counter(_kind(reason) for reason in refused.values())),
        "num_pairs": dict(pairs),
        "pairs_refused": dict(Counter(f"{part}: {_kind(reason)}" for _, part, reason in made.refusals)),
    }


def _kind(reason: str) -> str:
    return reason[:90]


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("medquad", type=Path, help="medquad.jsonl: {id, question, answers}")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", help="result file; in benchmarks/results/medquad_sets where not given")
    arguments = parser.parse_args()
    with arguments.medquad.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(arguments.rows), lines, strict=False)]
    answers = {row["id"]: (row["question"], row["answers"][0]) for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = teach(folder)
        with serve(model, folder / "log") as url:
            config = TeacherConfig(
                base_url=url, model="tiny", api_key_env=None, max_tokens=256, max_malformed=1, timeout_s=300.0,
                temperature=0.7, prices={"input_per_million": 1.0, "output_per_million": 2.0},
            )  # fmt: skip
            began = time.monotonic()
            first = Counting(Teacher(config, "", FileJournal(folder / "journal.jsonl")))
            known, refused, made, usage = build_sets(answers, model, first, config)
            seconds = time.monotonic() - began
            again = Counting(Teacher(config, "", FileJournal(folder / "journal.jsonl")))
            assert build_sets(answers, model, again, config) == (known, refused, made, usage)
    assert again.num_requests == 0
    result = digest(answers, known, refused, made) | {
        "num_requests": first.num_requests,
        "num_requests_of_a_second_pass": again.num_requests,
        "tokens_prompt": usage.num_prompt_tokens,
        "tokens_generated": usage.num_completion_tokens,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result, indent=1))
    print(f"written: {write_result('medquad_sets', result, arguments.out)}")


if __name__ == "__main__":
    main()
