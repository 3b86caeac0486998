"""What the benchmarks share: interleaved pairs, the ratio of each pair, one line for people and one for bench/run.

A claim is a ratio of ours to a reference measured in the same run, pair by pair, so that a change of the machine's
speed hits both. Figures are kept as they were measured; nothing is dropped as an outlier.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

__all__ = ["Claim", "Reference", "claim", "interleave", "interleave_all", "publish", "unmeasured"]

MARK = "BENCH "
"""Begins the line that bench/run collects."""


class Reference(StrEnum):
    """What a figure of ours is held against."""

    LIMIT = "limit"
    """The bare minimum of the same work: a loop in C, a client without a server around it, a fixed budget."""
    PEER = "peer"
    """Another program that people use for the same."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One measured ratio. ``better`` is ``less`` or ``more``; ``goal`` is the ratio aimed at. ``ratios`` has one
    figure a pair of runs; ``low`` and ``high`` are their range."""

    name: str
    ratio: float | None
    low: float | None
    high: float | None
    ours: float | None
    reference: float | None
    unit: str
    reference_name: str
    better: str
    goal: float
    note: str = ""
    against: Reference = Reference.LIMIT
    ratios: tuple[float, ...] = field(default=())

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal; None when nothing was measured."""
        if self.ratio is None:
            return None
        return self.ratio <= self.goal if self.better == "less" else self.ratio >= self.goal


def interleave(
    ours: Callable[[], float], reference: Callable[[], float], *, pairs: int
) -> tuple[list[float], list[float]]:
    """Run both in turn ``pairs`` times after one uncounted pair, changing who goes first; returns the figures."""
    mine, theirs = interleave_all((ours, reference), pairs=pairs)
    return mine, theirs


def interleave_all(runs: Sequence[Callable[[], float]], *, pairs: int) -> list[list[float]]:
    """As :func:`interleave` for any number of runs, the order turned round every time; their figures."""
    figures: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for turn in range(pairs):
        places = range(len(runs))
        for place in reversed(places) if turn % 2 else places:
            figures[place].append(runs[place]())
    return figures


def claim(
    name: str,
    mine: Sequence[float],
    theirs: Sequence[float],
    *,
    unit: str,
    reference_name: str,
    better: str,
    goal: float,
    note: str = "",
    against: Reference = Reference.LIMIT,
) -> Claim:
    """The claim that pairs of figures support: the median of the pairs' ratios, and their range."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return Claim(
        name=name,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        ours=statistics.median(mine),
        reference=statistics.median(theirs),
        unit=unit,
        reference_name=reference_name,
        better=better,
        goal=goal,
        note=note,
        against=against,
        ratios=tuple(ratios),
    )


def unmeasured(
    name: str,
    *,
    reference_name: str,
    better: str,
    goal: float,
    why: str,
    against: Reference = Reference.PEER,
) -> Claim:
    """A claim whose reference is not here; said instead of left out."""
    return Claim(name, None, None, None, None, None, "", reference_name, better, goal, why, against)


def publish(claims: Sequence[Claim]) -> None:
    """Print the claims for people, and for bench/run."""
    for item in claims:
        if item.ratio is None:
            print(f"{item.name}: not measured: {item.note}")
        else:
            sign = "<=" if item.better == "less" else ">="
            print(
                f"{item.name}: {item.ratio:.2f} of {item.reference_name} [{item.low:.2f}..{item.high:.2f}], "
                f"goal {sign} {item.goal:g} ({'met' if item.met else 'NOT met'}); "
                f"{item.ours:.4g} against {item.reference:.4g} {item.unit}"
                + (f"; {item.note}" if item.note else "")
            )
    print(MARK + json.dumps([asdict(item) | {"met": item.met} for item in claims]))
    sys.stdout.flush()
