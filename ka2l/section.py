"""The base of every config section: unknown keys are refused, ``kind`` is checked against the owner's list."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """One section of a run's config, owned by the module that uses it.

    Subclasses that offer a choice declare ``KINDS`` and a field ``kind: str``. A ``kind`` of the form
    ``package.module:Class`` names third-party code and is accepted as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    KINDS: ClassVar[tuple[str, ...]] = ()

    LOGISTICS: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where and how fast, never what: they stay out of fingerprints."""

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, values: Any) -> Any:
        if cls.KINDS and isinstance(values, dict) and "kind" in values:
            kind = values["kind"]
            if kind not in cls.KINDS and not (isinstance(kind, str) and is_plugin(kind)):
                raise ValueError(f"kind {kind!r} is not one of {', '.join(cls.KINDS)} (or module:Class)")
        return values

    def result_fields(self) -> dict[str, Any]:
        """The fields that change results, as JSON-safe values: what a stage's fingerprint is made from."""
        fields = self.model_dump(mode="json", exclude=set(self.LOGISTICS))
        for name, value in self:
            if isinstance(value, Section) and name in fields:
                fields[name] = value.result_fields()
        return fields


def is_plugin(kind: str) -> bool:
    """Whether a kind names an object of the user's own, as ``module:Class``."""
    return ":" in kind
