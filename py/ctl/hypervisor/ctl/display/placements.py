"""Explanations of placements and the capacity of a cluster, for a person."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hypervisor.ctl.display.details import labelled
from hypervisor.ctl.display.table import Column, harmless, render

if TYPE_CHECKING:
    from hypervisor.v1.instance_pb2 import ScorePart
    from hypervisor.v1.placement_pb2 import ClusterCapacity, NodeCapacity, NodeJudgement, PlacementExplanation

__all__ = ["capacity_text", "explanation_text", "judgements_table"]


def explanation_text(found: "PlacementExplanation", *, name: str) -> str:
    """Why this node, what else there is, and why the others are not."""
    chosen = next((one for one in found.nodes if one.node_id == found.node_id), None)
    lines = labelled(
        [
            ("Instance", name),
            ("Node", f"{found.hostname} ({found.node_id})" if found.node_id else "none fits"),
            ("Nodes", f"{found.nodes_fit} of {found.nodes_considered} fit"),
            ("Placed", _recorded(found)),
            ("Scheduler", found.scheduler),
            ("Now", _now(found, chosen)),
        ]
    ).splitlines()
    lines += judgements_table(found)
    if found.HasField("asked_node"):
        lines += ["", *_asked(found.asked_node)]
    return "\n".join(lines)


def judgements_table(found: "PlacementExplanation") -> list[str]:
    """The nodes with each score's part, or what they fail; then how many others fail what."""
    fitting = [one for one in found.nodes if one.fits]
    failing = [one for one in found.nodes if not one.fits]
    lines: list[str] = []
    if fitting:
        lines += ["", *render(_score_columns(fitting), fitting)]
    if failing:
        lines += ["", *render(_failed_columns(), failing)]
    if found.refusals:
        lines += ["", "Nodes that do not fit, by the check they fail first:"]
        for one in found.refusals:
            nodes = "1 node" if one.nodes == 1 else f"{one.nodes} nodes"
            lines.append(
                f"  {harmless(one.filter)}: {nodes}, such as {harmless(one.hostname)}: {harmless(one.example)}"
            )
    return lines


def capacity_text(found: "ClusterCapacity") -> str:
    """How many more fit, and where."""
    more = "or more (counting ended there)" if found.limit_reached else "more"
    fit = "fits" if found.count == 1 and not found.limit_reached else "fit"
    lines = [f"{found.count} {more} {fit}"]
    if found.nodes:
        lines += ["", *render(_capacity_columns(), list(found.nodes))]
    left_out = found.nodes_considered - len(found.nodes)
    if left_out > 0:
        ends = ", ".join(f"{one.filter} {one.nodes}" for one in found.limits)
        lines += [
            "",
            f"and {left_out} more nodes; of all {found.nodes_considered}, by what ends it there: {ends}",
        ]
    return "\n".join(lines)


def _recorded(found: "PlacementExplanation") -> str:
    if not found.HasField("recorded"):
        return ""
    record = found.recorded
    parts = f": {_parts(record.parts)}" if record.parts else ""
    return f"{record.placed_at.ToJsonString()} by {record.scheduler}, score {record.score}{parts}"


def _now(found: "PlacementExplanation", chosen: "NodeJudgement | None") -> str:
    """What the scheduler would do now, where that is another matter than what it did."""
    if not found.node_id or found.node_id == found.best_node_id:
        return ""
    best = next(
        (one.hostname for one in found.nodes if one.node_id == found.best_node_id), found.best_node_id
    )
    if not best:
        return "placed anew it would fit nowhere"
    rank = (
        "it does not fit here any more"
        if chosen is None or not chosen.fits
        else f"its node ranks {chosen.rank}"
    )
    return f"placed anew it would go to {best}; {rank}"


def _asked(node: "NodeJudgement") -> list[str]:
    name = harmless(node.hostname)
    if node.fits:
        return [f"Node {name} fits and ranks {node.rank} with {node.score}: {_parts(node.parts)}"]
    return [f"Node {name} does not fit:"] + [
        f"  {harmless(check.filter)}: {harmless(check.reason)}" for check in node.failed
    ]


def _parts(parts: "Iterable[ScorePart]") -> str:
    return ", ".join(f"{part.name} {part.value}x{part.weight}" for part in parts)


def _score_columns(nodes: "list[NodeJudgement]") -> "list[Column[NodeJudgement]]":
    names = list(dict.fromkeys(part.name for node in nodes for part in node.parts))
    columns: list[Column[NodeJudgement]] = [
        Column("RANK", lambda n: str(n.rank), right=True),
        Column("NODE", lambda n: n.hostname),
        Column("SCORE", lambda n: str(n.score), right=True),
    ]
    columns += [
        Column(
            name.upper(),
            lambda n, name=name: "+".join(f"{p.value}x{p.weight}" for p in n.parts if p.name == name),  # type: ignore[misc]
            right=True,
        )
        for name in names
    ]
    return columns


def _failed_columns() -> "list[Column[NodeJudgement]]":
    return [
        Column("NODE", lambda n: n.hostname),
        Column("FAILS", lambda n: ", ".join(check.filter for check in n.failed)),
        Column("WHY", lambda n: "; ".join(check.reason for check in n.failed)),
    ]


def _capacity_columns() -> "list[Column[NodeCapacity]]":
    return [
        Column("NODE", lambda n: n.hostname),
        Column("MORE", lambda n: str(n.count), right=True),
        Column("LIMITED BY", lambda n: n.limit.filter),
        Column("WHY", lambda n: n.limit.reason),
    ]
