"""What becomes of the benchmarks' figures: latest.json (for programs), latest.md (a table) and latest.html (plots).

Pure: values in, text out. A run of some benchmarks replaces the entries of those and keeps the others, each with the
day and the machine it was measured on, so that no row claims to be newer than it is.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

__all__ = ["Entry", "entry", "merged", "page", "table"]

Entry = Mapping[str, object]
"""One measured ratio: bench, metric, value (ours), unit, limit and peer (the reference's figure, ``{name, value}``; one
of them None), ratio (ours to the reference's, median over the pairs), better (``less`` or ``more``), goal (a ratio),
met (None where nothing was measured), spread (``{low, high, runs}`` of the pairs' ratios), note, day, machine."""

_ROW_PX = 26
_LABEL_PX = 430
_PLOT_PX = 420
_FIGURES_PX = 330

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; color: #1c1b1f; background: #fff }
svg text { font: 12px system-ui, sans-serif; fill: #1c1b1f }
svg .quiet { fill: #49454f }
.met { fill: #1b7f4b; stroke: #1b7f4b }
.missed { fill: #b3261e; stroke: #b3261e }
.goal { stroke: #49454f; stroke-dasharray: 3 3 }
.axis { stroke: #cac4d0 }
@media (prefers-color-scheme: dark) {
  body { color: #e6e1e5; background: #1c1b1f }
  svg text { fill: #e6e1e5 }
  svg .quiet { fill: #cac4d0 }
  .met { fill: #6dd58c; stroke: #6dd58c }
  .missed { fill: #f2b8b5; stroke: #f2b8b5 }
  .goal { stroke: #cac4d0 }
  .axis { stroke: #49454f }
}
"""


def entry(bench: str, claim: Mapping[str, object], *, day: str, machine: str) -> Entry:
    """The entry of a claim as ``measure.publish`` prints it."""
    reference = {"name": claim["reference_name"], "value": claim["reference"]}
    limit = claim.get("against", "limit") == "limit"
    spread = None
    if claim["ratio"] is not None:
        spread = {"low": claim["low"], "high": claim["high"], "runs": len(_ratios(claim))}
    return {
        "bench": bench,
        "metric": claim["name"],
        "value": claim["ours"],
        "unit": claim["unit"],
        "limit": reference if limit else None,
        "peer": None if limit else reference,
        "ratio": claim["ratio"],
        "better": claim["better"],
        "goal": claim["goal"],
        "met": claim["met"],
        "spread": spread,
        "note": claim["note"],
        "day": day,
        "machine": machine,
    }


def merged(old: Iterable[Entry], new: Sequence[Entry], *, benches: Iterable[str]) -> list[Entry]:
    """``new`` in place of all that ``old`` has of ``benches``; by bench, in the order in which each was measured."""
    replaced = set(benches)
    kept = [one for one in old if one["bench"] not in replaced]
    return sorted([*kept, *new], key=lambda one: str(one["bench"]))


def table(entries: Sequence[Entry]) -> str:
    """The entries as Markdown, a section for each day and machine."""
    lines = [
        "# Results",
        "Ratios are medians over interleaved pairs of runs, with their range; see ../README.md. Plots: latest.html.",
    ]
    for (day, machine), some in groupby(sorted(entries, key=_when), key=_when):
        lines += [
            "",
            f"## {day}: {machine}",
            "| claim | ratio | of | figures (ours / reference) | goal |",
            "|---|---|---|---|---|",
            *(_row(one) for one in some),
        ]
    return "\n".join(lines) + "\n"


def page(entries: Sequence[Entry]) -> str:
    """The entries as one HTML page of plots (SVG inside, nothing fetched): on a logarithmic axis the range of each
    claim's ratios, its median, and its goal."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Benchmarks</title>",
        f"<style>{_STYLE}</style>",
        "<h1>Benchmarks</h1><p>Each row is a ratio of ours to a limit or to a peer, measured in one run: the dot is "
        "the median of the pairs, the bar their range, the dashed line the goal (a triangle points to where it is "
        "met). The axis is logarithmic.</p>",
    ]
    for bench, some in groupby(entries, key=lambda one: str(one["bench"])):
        parts += [f"<h2>{html.escape(bench)}</h2>", _plot(list(some))]
    return "\n".join([*parts, "</html>"]) + "\n"


def _when(one: Entry) -> tuple[str, str]:
    return str(one["day"]), str(one["machine"])


def _ratios(claim: Mapping[str, object]) -> Sequence[object]:
    ratios = claim.get("ratios")
    return ratios if isinstance(ratios, list | tuple) else ()


def _reference(one: Entry) -> Mapping[str, object]:
    found = one["limit"] or one["peer"]
    assert isinstance(found, Mapping)
    return found


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _spread(one: Entry) -> tuple[float, float, int]:
    spread = one["spread"]
    assert isinstance(spread, Mapping)
    return _number(spread["low"]), _number(spread["high"]), int(_number(spread["runs"]))


def _verdict(one: Entry) -> str:
    sign = "≤" if one["better"] == "less" else "≥"
    return f"{sign} {_number(one['goal']):g}: {'met' if one['met'] else 'not met'}"


def _figures(one: Entry) -> str:
    return f"{_number(one['value']):.4g} / {_number(_reference(one)['value']):.4g} {one['unit']}"


def _row(one: Entry) -> str:
    reference = _reference(one)["name"]
    if one["ratio"] is None:
        return f"| {one['metric']} | not measured: {one['note']} | {reference} | | |"
    low, high, runs = _spread(one)
    note = f" ({one['note']})" if one["note"] else ""
    return (
        f"| {one['metric']} | **{_number(one['ratio']):.3g}** [{low:.3g}..{high:.3g}, {runs} runs] | {reference} "
        f"| {_figures(one)}{note} | {_verdict(one)} |"
    )


def _plot(entries: Sequence[Entry]) -> str:
    measured = [one for one in entries if one["ratio"] is not None]
    ends = [end for one in measured for end in (*_spread(one)[:2], _number(one["goal"])) if end > 0] or [1.0]
    low = math.floor(math.log10(min(ends)) * 2) / 2
    high = max(math.ceil(math.log10(max(ends)) * 2) / 2, low + 0.5)

    def x(ratio: float) -> float:
        exponent = math.log10(max(ratio, 10**low))
        return _LABEL_PX + (exponent - low) / (high - low) * _PLOT_PX

    height = _ROW_PX * (len(entries) + 1)
    parts = [
        f'<svg viewBox="0 0 {_LABEL_PX + _PLOT_PX + _FIGURES_PX} {height}" width="100%" role="img" '
        f'aria-label="ratios">'
    ]
    parts.extend(
        f'<line class="axis" x1="{x(10**step):.1f}" x2="{x(10**step):.1f}" y1="0" y2="{height - _ROW_PX}"/>'
        f'<text class="quiet" text-anchor="middle" x="{x(10**step):.1f}" y="{height - 8}">{10**step:g}</text>'
        for step in range(math.ceil(low), math.floor(high) + 1)
    )
    for index, one in enumerate(entries):
        y = _ROW_PX * index + _ROW_PX / 2
        label = f"{one['metric']} / {_reference(one)['name']}"
        parts.append(
            f'<text x="0" y="{y + 4}">{html.escape(_shortened(label))}<title>{html.escape(label)}</title></text>'
        )
        right = _LABEL_PX + _PLOT_PX + 12
        if one["ratio"] is None:
            why = html.escape(_shortened(f"not measured: {one['note']}", 48))
            parts.append(f'<text class="quiet" x="{right}" y="{y + 4}">{why}</text>')
            continue
        first, last, _ = _spread(one)
        goal, better = x(_number(one["goal"])), -5 if one["better"] == "less" else 5
        kind = "met" if one["met"] else "missed"
        parts.append(
            f'<line class="goal" x1="{goal:.1f}" x2="{goal:.1f}" y1="{y - 11}" y2="{y + 11}"/>'
            f'<path class="goal" d="M{goal:.1f} {y - 11}l{better} 3l{-better} 3z"/>'
            f'<line class="{kind}" stroke-width="3" x1="{x(first):.1f}" x2="{x(last):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="{kind}" cx="{x(_number(one["ratio"])):.1f}" cy="{y}" r="5"/>'
            f'<text x="{right}" y="{y + 4}">{_number(one["ratio"]):.3g}, goal {html.escape(_verdict(one))}'
            f"<title>{html.escape(_figures(one))}</title></text>"
        )
    return "".join([*parts, "</svg>"])


def _shortened(text: str, length: int = 66) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
