"""Filters (may this node run it? if not, why) and scores (how well does it suit, 0..1000): small pure objects.

``FILTERS`` and ``SCORES`` are the explicit tables the default scheduler is made of. They say what it does and explain
its choices; for the choice itself it uses a table that computes the same (``table.py``), which the tests hold equal to
these. Scores are whole numbers, so that equal means equal on every machine.
"""

from collections.abc import Iterable
from typing import Protocol

from hypervisor.core.model import AffinityTerm, LabelConstraint, Taint
from hypervisor.core.resources import GIB, MIB, Resources, cores
from hypervisor.core.states import LabelOperator, NodeStatus, PlacementPolicy, TaintEffect
from hypervisor.server.scheduler.case import Case, place_of
from hypervisor.server.scheduler.contract import NodeState, holds

__all__ = ["BEST", "FILTERS", "SCORES", "Filter", "Score", "TermsScore", "shortage"]

BEST = 1000
"""The best value of a score."""
_UNKNOWN_LOAD = 500
_ONE = 1 << 30


class Filter(Protocol):
    """One condition. Others are added by entry points of the group ``hypervisor.scheduler.filters``."""

    @property
    def name(self) -> str:
        """How explanations call it."""
        ...

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        """None where the node passes, else one clause that says what is missing and by how much."""
        ...


class Score(Protocol):
    """One preference. Others are added by entry points of the group ``hypervisor.scheduler.scores``."""

    @property
    def name(self) -> str:
        """How explanations and ``scheduler.weights`` call it."""
        ...

    def score(self, case: Case, state: NodeState) -> int:
        """0 (worst) to 1000 (best); only called for nodes that passed all filters."""
        ...


class TermsScore(Protocol):
    """A preference with a value for each term of the request, each with its own share of the weight."""

    @property
    def name(self) -> str:
        """See :class:`Score`."""
        ...

    def values(self, case: Case, state: NodeState) -> Iterable[tuple[int, int]]:
        """For each term its value, 0..1000, and its share of the weight, 1..100 (hundredths)."""
        ...


class PinnedNode:
    """A request for one node by id or host name goes there or nowhere."""

    name = "pinned"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        if case.request.node in ("", state.node.id, state.node.hostname):
            return None
        return f"is not the node asked for ({case.request.node})"


class Ready:
    """The control plane hears from the node."""

    name = "ready"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        if state.node.status is NodeStatus.OFFLINE:
            return "is offline"
        return None


class Schedulable:
    """The node takes new instances."""

    name = "schedulable"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        node = state.node
        # Offline is another matter: whether it would take instances then is what `schedulable` says.
        if node.schedulable and node.status is not NodeStatus.MAINTENANCE:
            return None
        return f"is cordoned: {node.cordon_reason}" if node.cordon_reason else "is cordoned"


class DriverPresent:
    """The node has a driver for the type, it works, and can create."""

    name = "driver"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        kind = case.request.type
        driver = state.node.driver_for(kind)
        if driver is None:
            return f"has no driver for {kind.value} instances"
        if not driver.available:
            return f"cannot run {kind.value} instances: {driver.reason or f'{driver.name} is not available'}"
        lacking = driver.lacks("create")
        return None if lacking is None else f"cannot create instances: {lacking.reason}"


class LabelsMatch:
    """All conditions on the node's labels hold."""

    name = "labels"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        for constraint in case.request.constraints:
            found = state.label(constraint.key)
            if not holds(constraint, found):
                has = f"has no label {constraint.key}" if found is None else f"has {constraint.key}={found}"
                return f"{has}, wanted: {_wanted(constraint)}"
        return None


class TaintsTolerated:
    """The node has no taint ``no_schedule`` that the instance does not tolerate."""

    name = "taints"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        for taint in state.node.taints:
            if taint.effect is TaintEffect.NO_SCHEDULE and not _tolerated(case, taint):
                return f"has the taint {taint}, which is not tolerated"
        return None


class ResourcesFit:
    """What may be reserved on the node less what is suffices."""

    name = "resources"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        wanted, reserved, total = case.request.resources, state.reserved, state.total
        if (
            wanted.cpu_millis <= total.cpu_millis - reserved.cpu_millis
            and wanted.memory_bytes <= total.memory_bytes - reserved.memory_bytes
            and wanted.disk_bytes <= total.disk_bytes - reserved.disk_bytes
        ):
            return None
        return shortage(wanted, state.free, total)


class NearOthers:
    """Where affinity is required, a matching instance is in the same place."""

    name = "affinity"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        for term in case.affinity:
            place = place_of(state, term.topology)
            if place is None:
                return f"has no label {term.topology}, which affinity asks for"
            if not case.counts(term.selector, term.topology).get(place):
                return f"has no instance with {_selector(term)} in the same {term.topology} ({place})"
        return None


class AwayFromOthers:
    """Where anti-affinity is required, of this instance or of those that are there, the place has none that match."""

    name = "anti_affinity"

    def reason_against(self, case: Case, state: NodeState) -> str | None:
        for term in case.anti_affinity:
            place = place_of(state, term.topology)
            count = 0 if place is None else case.counts(term.selector, term.topology).get(place, 0)
            if count:
                return f"has {_instances(count)} with {_selector(term)} in the same {term.topology} ({place})"
        for term, by_place in case.refused.items():
            place = place_of(state, term.topology)
            count = 0 if place is None else by_place.get(place, 0)
            if count:
                return (
                    f"has {_instances(count)} that must not be with {_selector(term)} in the same {term.topology} "
                    f"({place})"
                )
        return None


class Utilisation:
    """The policy: spread prefers the node least reserved after the placement, binpack the most reserved one.

    Reserved means the mean of the shares of processors and memory that may be reserved, in thousandths; disk only ever
    counts as a limit. A resource that the node has none of does not count.
    """

    name = "utilisation"

    def score(self, case: Case, state: NodeState) -> int:
        wanted, reserved, total = case.request.resources, state.reserved, state.total
        amounts = (
            (reserved.cpu_millis, wanted.cpu_millis, total.cpu_millis),
            (reserved.memory_bytes // MIB, wanted.memory_bytes // MIB, total.memory_bytes // MIB),
        )
        shares = [_share(*amount) for amount in amounts if amount[2]]
        both = sum(shares) * (2 if len(shares) == 1 else 1)
        mean = (min(both, 1 << 31) >> 11) * BEST >> 20
        return mean if case.request.policy is PlacementPolicy.BINPACK else BEST - mean


class SpreadOverPlaces:
    """For each term of ``spec.spread``: places that hold fewer matching instances are better."""

    name = "spread"

    def values(self, case: Case, state: NodeState) -> Iterable[tuple[int, int]]:
        for term in case.request.spread:
            place = place_of(state, term.topology)
            count = 0 if place is None else case.counts(term.selector, term.topology).get(place, 0)
            yield 0 if place is None else BEST // (1 + count), term.weight


class Affinity:
    """For each preferred term of affinity and anti-affinity: all where it holds, nothing where it does not."""

    name = "affinity"

    def values(self, case: Case, state: NodeState) -> Iterable[tuple[int, int]]:
        request = case.request
        for terms, wants_some in ((request.affinity, True), (request.anti_affinity, False)):
            for term in terms:
                if term.preferred:
                    place = place_of(state, term.topology)
                    count = 0 if place is None else case.counts(term.selector, term.topology).get(place, 0)
                    yield BEST if (count > 0) is wants_some else 0, term.weight


class Load:
    """Nodes that are measured to be less busy are better; one of which nothing is known counts as half busy."""

    name = "load"

    def score(self, case: Case, state: NodeState) -> int:
        return BEST - (_UNKNOWN_LOAD if state.load < 0 else state.load)


class ImagePresent:
    """Nodes that have the image already are better, for a request that has one."""

    name = "image"

    def values(self, case: Case, state: NodeState) -> Iterable[tuple[int, int]]:
        if case.request.image:
            yield BEST if case.request.image in state.images else 0, 100


class Penalty:
    """Nodes on which placements keep failing are worse."""

    name = "penalty"

    def score(self, case: Case, state: NodeState) -> int:
        return BEST - state.penalty


class Taints:
    """Nodes with a taint ``prefer_no_schedule`` that the instance does not tolerate are worse."""

    name = "taints"

    def score(self, case: Case, state: NodeState) -> int:
        for taint in state.node.taints:
            if taint.effect is TaintEffect.PREFER_NO_SCHEDULE and not _tolerated(case, taint):
                return 0
        return BEST


FILTERS: tuple[Filter, ...] = (
    PinnedNode(),
    Ready(),
    Schedulable(),
    DriverPresent(),
    LabelsMatch(),
    TaintsTolerated(),
    ResourcesFit(),
    NearOthers(),
    AwayFromOthers(),
)
"""In the order in which a refusal names them."""

SCORES: tuple[Score | TermsScore, ...] = (
    Utilisation(),
    SpreadOverPlaces(),
    Affinity(),
    Load(),
    ImagePresent(),
    Penalty(),
    Taints(),
)


def shortage(wanted: Resources, free: Resources, total: Resources) -> str:
    """By how much it does not fit: ``needs 8 cores, 2.5 free of 4``, for each resource that is short."""
    parts = []
    if wanted.cpu_millis > free.cpu_millis:
        parts.append(
            f"needs {_number(cores(wanted.cpu_millis))} cores, {_number(cores(max(0, free.cpu_millis)))} free "
            f"of {_number(cores(total.cpu_millis))}"
        )
    for noun, unit, unit_name, need, have, whole in (
        ("memory", MIB, "MiB", wanted.memory_bytes, free.memory_bytes, total.memory_bytes),
        ("disk", GIB, "GiB", wanted.disk_bytes, free.disk_bytes, total.disk_bytes),
    ):
        if need > have:
            parts.append(
                f"needs {_number(need / unit)} {unit_name} of {noun}, {_number(max(0, have) / unit)} free "
                f"of {_number(whole / unit)}"
            )
    return "; ".join(parts)


def _share(reserved: int, wanted: int, total: int) -> int:
    """Share of a resource that is reserved after the placement, in units of 2**-30, rounded as the table does."""
    return min(_ONE, reserved * _ONE // total) + wanted * (_ONE // total)


def _tolerated(case: Case, taint: Taint) -> bool:
    return any(toleration.covers(taint) for toleration in case.request.tolerations)


def _instances(count: int) -> str:
    return "an instance" if count == 1 else f"{count} instances"


def _selector(term: AffinityTerm) -> str:
    return ", ".join(_condition(c) for c in term.selector)


def _condition(constraint: LabelConstraint) -> str:
    match constraint.operator:
        case LabelOperator.EXISTS:
            return constraint.key
        case LabelOperator.NOT_IN:
            return f"{constraint.key} not in ({', '.join(constraint.values)})"
        case _:
            return f"{constraint.key} in ({', '.join(constraint.values)})"


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _wanted(constraint: LabelConstraint) -> str:
    values = ", ".join(constraint.values)
    match constraint.operator:
        case LabelOperator.EXISTS:
            return "any value"
        case LabelOperator.NOT_IN:
            return f"none of {values}"
        case _:
            return f"one of {values}"
