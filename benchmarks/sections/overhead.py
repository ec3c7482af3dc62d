"""The engine beside bare vLLM and a bare forward loop."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import figure, table

TITLE = "What the engine costs on top of bare vLLM"
COMMAND = "python benchmarks/bench_overhead.py"


def section(result: dict[str, Any]) -> Section:
    """Seconds of the engine, of bare calls, and of the published way."""
    engine, vllm, bare = (result["medians"][name] for name in ("engine", "vllm", "transformers"))
    ratios, settings = result["ratios"], result["settings"]
    lines = {
        "generate": (engine["generate_seconds"], vllm["generate_seconds"], vllm["passes_seconds"]),
        "generate, from start": (engine["generate_from_start_seconds"], vllm["generate_from_start_seconds"], None),
        "extract": (engine["forward_seconds"], bare["forward_seconds"], bare["keep_all_seconds"]),
    }
    rows = [
        [name, figure(ours, 2), figure(theirs, 2), figure(public, 2), figure(ours / theirs, 2),
         figure(public / ours if public else None, 2)]
        for name, (ours, theirs, public) in lines.items()
    ]  # fmt: skip
    headers = ["", "engine, s", "bare, s", "as published, s", "engine / bare", "as published / engine"]
    load = result.get("load_average_before")
    text = f"""What do Ray, shards, seeds and committed tables cost, and what does the engine save?
{settings["num_questions"]:,} questions with {settings["num_samples"]} answers each by the testbed's model,
medians of {settings["repeats"]} runs. Bare: one call of vLLM, and a plain forward loop. As published: one pass
after another with one answer each, and `generate` that keeps all hidden states, as KA2L's public code does. The
model is tiny, so that what is not its own work weighs as much as it
can.{f" Load average before the run: {load:.1f}." if load else ""}

{table(headers, rows)}

The stage `observe`, with reading, writing and committing, took {engine["observe_stage_seconds"]:.1f} s,
`extract` {engine["extract_stage_seconds"]:.1f} s."""
    named = {
        "generate_engine_over_bare": "Sampling by the engine takes {:.2f} times bare vLLM's seconds: shards and rows' "
        "seeds.",
        "generate_from_start_engine_over_bare": "From the start of the process to the last answer the engine takes "
        "{:.2f} times bare vLLM's seconds: Ray and its workers start, too.",
        "extract_engine_over_bare": "Extraction by the engine takes {:.2f} times a bare forward loop's seconds.",
    }
    losses = [line.format(ratios[key]) for key, line in named.items() if ratios[key] > 1.005]
    losses += [
        f"The published way to {name} takes {ratios[key]:.2f} times the engine's seconds: it is faster."
        for key, name in (("generate_public_over_engine", "sample"), ("extract_public_over_engine", "extract"))
        if ratios[key] < 0.995
    ]
    return Section(text, {}, losses)
