"""An annotator of one's own: a subclass that implements one method."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from rich.console import Console

from engine.annotation.annotators import annotator_class
from engine.config import load_config
from engine.inputs import prepare
from ka2l.annotation.annotator import Annotation, Annotator, AnnotatorConfig
from ka2l.errors import ConfigError


class Shouts(Annotator):
    """Answers every question with itself in capitals."""

    def __init__(self, config: AnnotatorConfig) -> None:
        self.config = config

    def annotate(self, questions: Mapping[str, str]) -> list[Annotation]:
        now = datetime.now(UTC)
        return [Annotation(name, text, [text.upper()], "shouts", now, None, 0.0) for name, text in questions.items()]


class NoAnnotator:
    """Has the method, but none of the defaults."""

    annotate = Shouts.annotate


def test_a_subclass_with_one_method_is_an_annotator_that_costs_holds_and_refuses_nothing() -> None:
    made = annotator_class(f"{__name__}:Shouts")(AnnotatorConfig(kind=f"{__name__}:Shouts"))
    assert [row.answers for row in made.annotate({"a": "who?"})] == [["WHO?"]]
    assert made.answerable({"a": "who?", "b": "where?"}) == {"a", "b"}
    assert (dict(made.refusals), made.stopped, made.usage) == ({}, None, None)
    made.close()


@pytest.mark.parametrize(
    ("section", "kind", "said"),
    [
        ("annotator", f"{__name__}:NoAnnotator", "subclass of ka2l.annotation.annotator.Annotator"),
        ("annotator", "no_such_module:Class", "cannot load 'no_such_module:Class'"),
        ("selection", "no_such_module:function", "cannot load 'no_such_module:function'"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_expensive(section: str, kind: str, said: str) -> None:
    config = load_config("quickstart", [f"{section}.kind={kind}"])
    with pytest.raises(ConfigError) as refused:
        prepare(config, Console())
    assert said in f"{refused.value.message} {refused.value.hint}"
