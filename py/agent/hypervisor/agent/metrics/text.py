"""Prometheus' text format, version 0.0.4. Pure, and made for many series: labels are written once for all of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["CONTENT_TYPE", "Family", "labels_text", "rendered"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name (a counter's ends in ``_total``), its kind, and what it says, in one line."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str


def labels_text(labels: Mapping[str, str]) -> str:
    """``{a="1",b="2"}``; empty for no labels."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"


def rendered(family: Family, samples: Iterable[tuple[str, int | float]]) -> str:
    """The family with its samples, each the text of its labels and its value; empty where there are none."""
    lines = [f"{family.name}{labels} {value}\n" for labels, value in samples]
    if not lines:
        return ""
    return f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n" + "".join(lines)
