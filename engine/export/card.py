"""The model card of an export: what the adapter is, what it was made from, how good it is, how to load it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.execution.campaign import Campaign
from engine.export.data import ANNOTATED, FILES, AnnotatedSet, Format
from engine.report.page import money
from engine.store.manifest import Manifest, fingerprint
from ka2l.errors import ModelError
from ka2l.model.loading import is_directory
from ka2l.pool.sources import is_dataset

_FENCE = re.compile(r"`{3,}")


class Licence(NamedTuple):
    """Of the base model."""

    metadata: dict[str, Any]
    """``license``, ``license_name`` and ``license_link`` as a model card has them; empty where it is not known."""
    sentence: str


def base_licence(base: str, revision: str | None = None) -> Licence:
    """What a base model's README or config.json says of its licence; of a model on the hub its README is looked up,
    in the cache first."""
    found: dict[str, Any] = {}
    source = "its README"
    readme = Path(base).expanduser() / "README.md" if is_local(base) else _readme_on_hub(base, revision)
    if readme is not None and readme.is_file():
        found = _front_matter(readme)
    config = Path(base).expanduser() / "config.json"
    if not found.get("license") and config.is_file():
        source = "its config.json"
        found = json.loads(config.read_text(encoding="utf-8"))
    given = {name: found[name] for name in ("license", "license_name", "license_link") if found.get(name)}
    given = {name: value for name, value in given.items() if isinstance(value, str)}
    if "license" not in given:
        return Licence({}, "Unknown: neither its README nor its config.json says. Ask before you pass this adapter on.")
    named = f"{given['license']} ({given['license_name']})" if "license_name" in given else given["license"]
    link = f", {given['license_link']}" if "license_link" in given else ""
    return Licence(given, f"{named}{link}, says {source}. An adapter is bound by it, too.")


def _readme_on_hub(base: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base, "README.md", revision=revision, etag_timeout=5))
    except Exception:  # offline, gated, without a README: then nobody knows
        return None


def _front_matter(readme: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    try:
        found: dict[str, Any] = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # not YAML, whatever it is
        return {}
    return found


class Whole(NamedTuple):
    """A whole model in an export."""

    place: str
    """Its folder in the export; empty where that itself is the model."""
    dtype: str
    """That its weights are saved in."""


class CardFacts(NamedTuple):
    """What a card is written from, besides the run."""

    round_index: int
    manifest: Manifest
    """Of the stage that trained the adapter."""
    summary: Mapping[str, Any]
    """The run's summary.json."""
    data: AnnotatedSet
    counts: Mapping[Format, int]
    """Rows of each exported format."""
    licence: Licence
    prompt: str
    """A whole prompt, with ``{question}`` where that stands."""
    chat: bool
    where: str
    """What the adapter's users load: ``.`` or a hub id."""
    name: str
    command: str | None
    """``vllm serve ...``."""
    not_served: str | None
    adapter_config: Mapping[str, Any] | None
    """None where the run has tuned a whole model."""
    whole: Whole | None
    """None where the adapter is all."""


def is_local(base: str) -> bool:
    """Whether a base model is a folder, even one that is not there."""
    try:
        return is_directory(base)
    except ModelError:
        return True


def base_name(base: str) -> str:
    """The base model without folders of this machine: a hub id, or a folder's own name."""
    return Path(base).expanduser().resolve().name if is_local(base) else base


def render_card(campaign: Campaign, facts: CardFacts) -> str:
    """The README.md with its metadata block."""
    import jinja2
    from huggingface_hub import ModelCardData

    base, adapter = base_name(campaign.model.path), facts.adapter_config
    metadata = ModelCardData(
        base_model=base,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="text-generation",
        tags=["ka2l", "active-learning", *([] if adapter is None else [str(adapter["peft_type"]).lower()])],
        **facts.licence.metadata,
    )
    environment = jinja2.Environment(
        autoescape=False,  # Markdown; see `_cell` and `_fenced`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=jinja2.PackageLoader("engine", "templates"),
    )
    environment.filters.update(cell=_cell, fenced=_fenced, count=lambda value: f"{value:,.0f}")
    return environment.get_template("model_card.md.j2").render(
        metadata=metadata.to_yaml(),
        base=base,
        base_is_local=is_local(campaign.model.path),
        at=f', revision="{campaign.model.revision}"' if campaign.model.revision else "",
        config=campaign.config,
        pool=_pool_name(campaign),
        rounds=_rounds(facts),
        beyond=_beyond(facts),
        measured=_state(facts.summary, facts.round_index + 1),
        before=_state(facts.summary, 0),
        spent=_spent(facts),
        annotators=Counter(example.annotator for example in facts.data.answers if example.part == ANNOTATED),
        num_annotated=sum(example.part == ANNOTATED for example in facts.data.answers),
        parts=Counter(example.part for example in (*facts.data.answers, *facts.data.preferences)),
        files={FILES[name]: count for name, count in facts.counts.items()},
        config_hash=fingerprint(config=campaign.config.result_fields()),
        figure=_figure,
        **facts._asdict(),
    )


def _pool_name(campaign: Campaign) -> str:
    path = campaign.config.pool.path
    return path if path == "testbed" or is_dataset(path) else path.rstrip("/").rsplit("/", 1)[-1]


def _state(summary: Mapping[str, Any], round_index: int) -> Mapping[str, Any] | None:
    return next((row for row in summary.get("rounds", []) if row["round"] == round_index), None)


def _rounds(facts: CardFacts) -> list[dict[str, str]]:
    """Table rows: one for each model state up to this adapter's."""
    rows = []
    for row in facts.summary.get("rounds", []):
        if row["round"] <= facts.round_index + 1:
            probe, kept = row.get("probe") or {}, row.get("forgetting")
            rows.append(
                {
                    "state": "base model" if row["round"] == 0 else f"after round {row['round'] - 1}",
                    "annotated": f"{row['num_annotated']:,}",
                    "accuracy": _figure(row.get("accuracy"), row.get("accuracy_ci")),
                    "kept": "" if kept is None or row["round"] == 0 else f"{1 - kept:.3f}",
                    "auroc": _figure(probe.get("auroc"), probe.get("auroc_ci")),
                }
            )
    return rows


#: Figures beside accuracy, as a card names them: section and name in ``evaluation`` of summary.json.
_BEYOND = {
    "facts correct an answer": ("facts", "correct"),
    "share of stated facts that are correct": ("facts", "share_correct"),
    "completeness": ("facts", "completeness"),
    "order": ("facts", "order"),
    "METEOR": ("text", "meteor"),
    "ROUGE-L": ("text", "rouge_l"),
    "BERTScore": ("text", "bert_score"),
}


def _beyond(facts: CardFacts) -> list[dict[str, str]]:
    """Table rows: figures beside accuracy of the base model and of this adapter; none where neither was measured."""
    states = [_state(facts.summary, index) or {} for index in (0, facts.round_index + 1)]
    rows = []
    for title, (section, name) in _BEYOND.items():
        found = [((state.get("evaluation") or {}).get(section) or {}).get(name) for state in states]
        # Text metrics have their mean beside a note on how they were made.
        estimates = [made["mean"] if isinstance(made, Mapping) else made for made in found]
        before, after = (_figure(made[0], made[1:]) if made else "" for made in estimates)
        if before or after:
            rows.append({"title": title, "before": before, "after": after})
    return rows


def _figure(value: float | None, interval: Sequence[float] | None) -> str:
    """``0.812 [0.790, 0.834]``; nothing where it was not measured."""
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def _spent(facts: CardFacts) -> dict[str, str]:
    """What the rounds up to this adapter took."""
    costs = [row["cost"] for row in facts.summary.get("rounds", []) if row["round"] <= facts.round_index]
    total = {item: sum(cost.get(item) or 0 for cost in costs) for item in (costs[0] if costs else {})}
    currency = (facts.summary.get("net") or {}).get("currency", "")
    return {
        "annotations": f"{total.get('annotation', 0):,}",
        "money": money(total.get("money", 0.0), currency),
        "tokens generated": f"{total.get('tokens_generated', 0):,.0f}",
        "hours": f"{total.get('seconds', 0.0) / 3600:,.2f}",
        "CPU-hours": f"{total.get('cpu_seconds', 0.0) / 3600:,.2f}",
        "GPU-hours": f"{total.get('gpu_seconds', 0.0) / 3600:,.2f}",
    }


def _cell(value: Any) -> str:
    """Text in a table or a sentence: on one line, and not taken for Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _fenced(text: str, language: str = "") -> str:
    """A code block, whatever fences its text holds."""
    longest = max((len(found) for found in _FENCE.findall(text)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
