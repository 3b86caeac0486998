"""Constants, values and formulas of the node table: integers only, so that every machine decides alike.

Filters, in the order in which :meth:`NodeTable.explain` tests them
    ``slot``           the request names a slot, and this is not it
    ``bits``           the node lacks bits that the request asks for
    ``cpu``, ``memory``, ``disk``   fits exactly when ``wanted <= free``; a node reserved beyond its total has free < 0
                       and takes nothing, not even 0
    ``class``          the node is not in a class that the request names
    ``affinity``       the counter is 0 in the node's domain, or the node has no domain
    ``anti_affinity``  the counter is above 0 in the node's domain; a node without a domain passes

Scores, each 0 (worst) to 1000 (best), and their sum weighted by the request's weights (0..1000)
    ``utilisation``    binpack: :func:`share`; spread: 1000 - :func:`share`
    ``load``           1000 - load; 500 where the load is unknown
    ``penalty``        1000 - penalty
    ``preference``     the column's value
    ``prefer``         1000 where the counter is above 0 in the node's domain, else 0; 0 without a domain
    ``avoid``          0 where the counter is above 0 in the node's domain, else 1000; 1000 without a domain
    ``spread``         ``1000 // (1 + count)`` of the node's domain; 0 without a domain

The node with the highest sum is chosen; among equals the one with the smallest :func:`tie_key`.
"""

from typing import NamedTuple

__all__ = [
    "BINPACK",
    "MAX_ADDS",
    "MAX_AMOUNT",
    "MAX_CLASSES",
    "MAX_COUNT",
    "MAX_DOMAINS",
    "MAX_HARD",
    "MAX_NODES",
    "MAX_PREFERENCES",
    "MAX_SOFT",
    "MAX_WEIGHT",
    "SPREAD",
    "UNKNOWN_LOAD",
    "Failure",
    "Judgement",
    "NodeRow",
    "Part",
    "base_and_rate",
    "mix32",
    "share",
    "share_of",
    "tie_key",
    "within",
]

BINPACK = 0
"""Policy: prefer the node that is reserved most after the placement."""

SPREAD = 1
"""Policy: prefer the node that is reserved least after the placement."""

MAX_AMOUNT = (1 << 30) - 1
"""Largest amount of a resource: a million processors, a pebibyte of memory, an exbibyte of disk."""

MAX_COUNT = 1 << 62
"""Largest number of instances or nodes that a call can be asked for."""

MAX_NODES = 1 << 20
MAX_DOMAINS = 1 << 20
"""Domains are numbered 0..MAX_DOMAINS - 1; number them densely, a counter takes 4 bytes for each up to the highest."""

MAX_WEIGHT = 1000
MAX_CLASSES = 4
"""Most classes one request can name."""
MAX_HARD = 16
"""Most counters one request can name in ``affinity`` and ``anti_affinity`` together."""
MAX_SOFT = 8
"""Most counters one request can name in ``prefer``, ``avoid`` and ``spread`` together."""
MAX_PREFERENCES = 4
"""Most preference columns one request can name."""
MAX_ADDS = 32
"""Most counters one request can name in ``adds``."""
UNKNOWN_LOAD = -1

_ONE = 1 << 30


class NodeRow(NamedTuple):
    """A slot's columns, as ``set_node`` and ``adjust`` left them."""

    node_hash: int
    cpu_total: int
    cpu_free: int
    memory_total: int
    memory_free: int
    disk_total: int
    disk_free: int
    bits: int
    load: int
    penalty: int


class Failure(NamedTuple):
    """A filter that a node does not pass.

    ``id`` is the class's or counter's, else 0. ``missing`` is by how much: what is short of a resource (above 0), the
    bits that lack, the count that is there against an anti-affinity; 1 otherwise.
    """

    kind: str
    id: int
    missing: int


class Part(NamedTuple):
    """One score's share of the sum: ``value`` (0..1000) times ``weight``. ``id`` is the preference's or counter's."""

    kind: str
    id: int
    value: int
    weight: int


class Judgement(NamedTuple):
    """All that a request makes of one node.

    ``score`` is the sum of the parts, also where the node fails (what it would score if it passed); parts of weight 0
    are left out. The node passes where ``failures`` is empty.
    """

    failures: tuple[Failure, ...]
    score: int
    parts: tuple[Part, ...]


def within(name: str, value: int, low: int, high: int) -> int:
    """The argument ``name``, checked: TypeError where it is no integer, ValueError out of its range."""
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low}..{high}, not {value}")
    return value


def mix32(value: int) -> int:
    """Mix 32 bits so that each result bit depends on all of them; a bijection (the finaliser "lowbias32")."""
    value ^= value >> 16
    value = value * 0x7FEB352D & 0xFFFFFFFF
    value ^= value >> 15
    value = value * 0x846CA68B & 0xFFFFFFFF
    return value ^ value >> 16


def tie_key(seed: int, node_hash: int) -> tuple[int, int]:
    """What breaks ties, smallest first: both are folded to 32 bits, joined and mixed; then the hash itself.

    The same seed favours the same nodes whatever their slots, different seeds different ones. Nodes with equal hashes
    would be told apart by their slots alone: give each its own.
    """
    folded = (seed ^ seed >> 32 ^ node_hash ^ node_hash >> 32) & 0xFFFFFFFF
    return mix32(folded), node_hash


def base_and_rate(total: int, free: int) -> tuple[int, int]:
    """A resource's reserved share and the share of one unit, both in units of 2**-30, rounded down.

    The share is limited to 1 (a node reserved beyond its total). 0, 0 where the total is 0.
    """
    if total == 0:
        return 0, 0
    return min(_ONE, (total - free) * _ONE // total), _ONE // total


def share_of(total: int, free: int, wanted: int) -> int:
    """Share of one resource that is reserved after the placement, in units of 2**-30; for ``wanted <= free``."""
    base, rate = base_and_rate(total, free)
    return base + wanted * rate


def share(row: NodeRow, cpu: int, memory: int) -> int:
    """Permille of the node that is reserved after the placement: the mean of processors and memory.

    A resource of which the node has none at all does not count; 0 where it has neither. Exactly::

        sum      = share_of(cpu) + share_of(memory)       in units of 2**-31 of the mean
        sum      = twice the other one where one total is 0
        permille = (min(sum, 2**31) >> 11) * 1000 >> 20   rounded down, 0..1000

    For a request that fits the sum cannot exceed 2**31; the limit is for :meth:`NodeTable.explain` of one that does
    not.
    """
    both = share_of(row.cpu_total, row.cpu_free, cpu) + share_of(row.memory_total, row.memory_free, memory)
    if row.cpu_total == 0 or row.memory_total == 0:
        both *= 2
    return (min(both, 1 << 31) >> 11) * 1000 >> 20
