"""The request of :mod:`._table_py`: the specification, and the oracle of :mod:`._request_c`."""

from collections.abc import Sequence

from hypervisor.ext.scoring._rules import (
    BINPACK,
    MAX_ADDS,
    MAX_AMOUNT,
    MAX_CLASSES,
    MAX_HARD,
    MAX_NODES,
    MAX_PREFERENCES,
    MAX_SOFT,
    MAX_WEIGHT,
    SPREAD,
    within,
)

__all__ = ["Request"]


class Request:
    """What is to be placed: never changes, and may be used with any number of calls.

    ``cpu`` (millicores), ``memory`` (MiB), ``disk`` (GiB): what is reserved, each 0..MAX_AMOUNT.
    ``bits``: all of these bits have to be set on the node (0..2**31 - 1).
    ``classes``: ids of classes the node has to be in, all of them (at most MAX_CLASSES).
    ``slot``: the one slot to consider; -1 for all. A slot without a node fits nothing.
    ``affinity``, ``anti_affinity``: ids of counters that have to be above 0, or 0, in the node's domain (at most
    MAX_HARD together).
    ``adds``: ids of counters that count the new instance itself: ``place`` adds 1 to each in the domain of the node
    chosen, if it has one (at most MAX_ADDS; an id may stand here and in the other fields).
    ``policy``: BINPACK or SPREAD, the direction of the score ``utilisation``.
    ``utilisation_weight``, ``load_weight``, ``penalty_weight``: weights of those scores, 0..MAX_WEIGHT.
    ``preferences``: (preference id, weight) pairs, at most MAX_PREFERENCES.
    ``prefer``, ``avoid``, ``spread``: (counter id, weight) pairs, at most MAX_SOFT together.

    Raises ValueError for a number out of its range and for too many ids, TypeError for what is no number. Ids are
    looked up when the request is used: KeyError there when one has been dropped.
    """

    __slots__ = (
        "adds",
        "affinity",
        "anti_affinity",
        "avoid",
        "bits",
        "classes",
        "cpu",
        "disk",
        "load_weight",
        "memory",
        "penalty_weight",
        "policy",
        "prefer",
        "preferences",
        "slot",
        "spread",
        "utilisation_weight",
    )

    def __init__(
        self,
        *,
        cpu: int = 0,
        memory: int = 0,
        disk: int = 0,
        bits: int = 0,
        classes: Sequence[int] = (),
        slot: int = -1,
        affinity: Sequence[int] = (),
        anti_affinity: Sequence[int] = (),
        adds: Sequence[int] = (),
        policy: int = BINPACK,
        utilisation_weight: int = 1,
        load_weight: int = 0,
        penalty_weight: int = 0,
        preferences: Sequence[tuple[int, int]] = (),
        prefer: Sequence[tuple[int, int]] = (),
        avoid: Sequence[tuple[int, int]] = (),
        spread: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.cpu = within("cpu", cpu, 0, MAX_AMOUNT)
        self.memory = within("memory", memory, 0, MAX_AMOUNT)
        self.disk = within("disk", disk, 0, MAX_AMOUNT)
        self.bits = within("bits", bits, 0, (1 << 31) - 1)
        self.slot = within("slot", slot, -1, MAX_NODES - 1)
        self.policy = within("policy", policy, BINPACK, SPREAD)
        self.utilisation_weight = within("utilisation_weight", utilisation_weight, 0, MAX_WEIGHT)
        self.load_weight = within("load_weight", load_weight, 0, MAX_WEIGHT)
        self.penalty_weight = within("penalty_weight", penalty_weight, 0, MAX_WEIGHT)
        self.classes = _ids(classes)
        self.affinity = _ids(affinity)
        self.anti_affinity = _ids(anti_affinity)
        self.adds = _ids(adds)
        self.preferences = _weighted(preferences)
        self.prefer = _weighted(prefer)
        self.avoid = _weighted(avoid)
        self.spread = _weighted(spread)
        for what, count, most in (
            ("classes", len(self.classes), MAX_CLASSES),
            ("affinity and anti_affinity", len(self.affinity) + len(self.anti_affinity), MAX_HARD),
            ("adds", len(self.adds), MAX_ADDS),
            ("preferences", len(self.preferences), MAX_PREFERENCES),
            ("prefer, avoid and spread", len(self.prefer) + len(self.avoid) + len(self.spread), MAX_SOFT),
        ):
            if count > most:
                raise ValueError(f"{what}: at most {most} ids")


def _ids(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(within("id", one, 0, (1 << 63) - 1) for one in ids)


def _weighted(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (within("id", one, 0, (1 << 63) - 1), within("weight", weight, 0, MAX_WEIGHT))
        for one, weight in pairs
    )
