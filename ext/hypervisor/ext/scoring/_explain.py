"""One node under one request, check by check: the readable meaning of the table, behind both implementations."""

from collections.abc import Sequence
from typing import Protocol

from hypervisor.ext.scoring._rules import BINPACK, UNKNOWN_LOAD, Failure, Judgement, NodeRow, Part, share

__all__ = ["RequestLike", "TableLike", "explain"]


class RequestLike(Protocol):
    """What is read of a request; see :class:`._table_py.Request`."""

    @property
    def cpu(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def disk(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def classes(self) -> Sequence[int]: ...
    @property
    def affinity(self) -> Sequence[int]: ...
    @property
    def anti_affinity(self) -> Sequence[int]: ...
    @property
    def policy(self) -> int: ...
    @property
    def utilisation_weight(self) -> int: ...
    @property
    def load_weight(self) -> int: ...
    @property
    def penalty_weight(self) -> int: ...
    @property
    def preferences(self) -> Sequence[tuple[int, int]]: ...
    @property
    def prefer(self) -> Sequence[tuple[int, int]]: ...
    @property
    def avoid(self) -> Sequence[tuple[int, int]]: ...
    @property
    def spread(self) -> Sequence[tuple[int, int]]: ...


class TableLike(Protocol):
    """What is read of a table; see :class:`._table_py.NodeTable`."""

    def node(self, slot: int) -> NodeRow: ...
    def class_value(self, class_id: int, slot: int) -> bool: ...
    def preference_value(self, preference: int, slot: int) -> int: ...
    def count_near(self, counter: int, slot: int) -> int | None: ...


def explain(table: TableLike, request: RequestLike, slot: int) -> Judgement:
    """See :meth:`._table_py.NodeTable.explain`."""
    row = table.node(slot)
    parts = _parts(table, request, slot, row)
    score = sum(part.value * part.weight for part in parts)
    return Judgement(tuple(_failures(table, request, slot, row)), score, tuple(parts))


def _failures(table: TableLike, request: RequestLike, slot: int, row: NodeRow) -> list[Failure]:
    found: list[Failure] = []
    if request.slot not in (-1, slot):
        found.append(Failure("slot", 0, 1))
    if request.bits & ~row.bits:
        found.append(Failure("bits", 0, request.bits & ~row.bits))
    for kind, wanted, free in (
        ("cpu", request.cpu, row.cpu_free),
        ("memory", request.memory, row.memory_free),
        ("disk", request.disk, row.disk_free),
    ):
        if wanted > free:
            found.append(Failure(kind, 0, wanted - free))
    found += [Failure("class", one, 1) for one in request.classes if not table.class_value(one, slot)]
    found += [Failure("affinity", one, 1) for one in request.affinity if not table.count_near(one, slot)]
    for one in request.anti_affinity:
        count = table.count_near(one, slot)
        if count:
            found.append(Failure("anti_affinity", one, count))
    return found


def _parts(table: TableLike, request: RequestLike, slot: int, row: NodeRow) -> list[Part]:
    reserved = share(row, request.cpu, request.memory)
    utilisation = reserved if request.policy == BINPACK else 1000 - reserved
    load = 500 if row.load == UNKNOWN_LOAD else 1000 - row.load
    parts = [
        Part("utilisation", 0, utilisation, request.utilisation_weight),
        Part("load", 0, load, request.load_weight),
        Part("penalty", 0, 1000 - row.penalty, request.penalty_weight),
    ]
    for one, weight in request.preferences:
        parts.append(Part("preference", one, table.preference_value(one, slot), weight))
    for one, weight in request.prefer:
        parts.append(Part("prefer", one, 1000 if table.count_near(one, slot) else 0, weight))
    for one, weight in request.avoid:
        parts.append(Part("avoid", one, 0 if table.count_near(one, slot) else 1000, weight))
    for one, weight in request.spread:
        count = table.count_near(one, slot)
        parts.append(Part("spread", one, 0 if count is None else 1000 // (1 + count), weight))
    return [part for part in parts if part.weight]
