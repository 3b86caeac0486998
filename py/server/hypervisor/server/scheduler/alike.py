"""Which nodes are alike: by the value of each label that some request has asked about, and by their taints.

What a request asks of a node's record is judged once for each distinct value and each distinct set of taints; the nodes
that pass are then found by sets of slots. The answers are those of ``Static.eligible`` and ``Static.mildness`` of
``columns.py`` node by node. Labels are taken up when they are first asked about; the least lately used are forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

from hypervisor.core.model import LabelConstraint, Taint
from hypervisor.core.states import LabelOperator
from hypervisor.server.scheduler.columns import Static
from hypervisor.server.scheduler.contract import BUILT_IN_LABELS, NodeState

__all__ = ["Alike"]

HOSTNAME = "hypervisor/hostname"
_LABELS_KEPT = 64
Values = dict[str | None, int | set[int]]
"""The slot or slots (two or more) by the value of a label; None: those that have no such label. One slot is no set: ten
thousand sets for the host names of as many nodes would be ten thousand objects for the garbage collector."""


class Alike:
    """See the module's docstring. ``slots`` are those of the nodes there are, by id, kept by the caller."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._slots = slots
        self._known: dict[int, NodeState] = {}
        """By slot, with the record as it is now; whatever else is in the states may be old."""
        self._labels: OrderedDict[str, Values] = OrderedDict()
        self._taints: dict[tuple[Taint, ...], dict[int, NodeState]] = {}

    def change(self, slot: int, old: NodeState | None, new: NodeState | None) -> None:
        """A node came (``old`` None), has another record, or goes (``new`` None)."""
        for key, values in self._labels.items():
            before = None if old is None else old.label(key)
            after = None if new is None else new.label(key)
            if old is None or new is None or before != after:
                if old is not None:
                    _leave(values, before, slot)
                if new is not None:
                    _enter(values, after, slot)
        if old is not None:
            some = self._taints[old.node.taints]
            del some[slot]
            if not some:
                del self._taints[old.node.taints]
            del self._known[slot]
        if new is not None:
            self._known[slot] = new
            self._taints.setdefault(new.node.taints, {})[slot] = new

    def named(self, name: str) -> set[int]:
        """Slots of the nodes with the id or the host name."""
        found = _slots_of(self._values(HOSTNAME), [name])
        slot = self._slots.get(name)
        return found if slot is None else {*found, slot}

    def eligible(self, look: Static) -> set[int]:
        """Slots of the nodes that pass the filters that look at their records alone."""
        found: set[int] | None = self.named(look.node) if look.node else None
        # The fewer are left, the less is to be looked up for the next: rare values first.
        for some in sorted((self._meeting(one) for one in look.constraints), key=len):
            found = some if found is None else found & some
        untolerated = [slots for slots in self._taints.values() if not look.tolerates(_one_of(slots))]
        if found is None:
            found = self._all()
        for slots in untolerated:
            found = found.difference(slots)
        return found

    def mildness(self, look: Static) -> Iterator[tuple[int, Iterable[int]]]:
        """What the score ``taints`` says, and of which slots; together these are all."""
        for slots in self._taints.values():
            yield look.mildness(_one_of(slots)), slots

    def _meeting(self, condition: LabelConstraint) -> set[int]:
        """Slots of the nodes whose label meets it, as ``holds`` says: there may be as many values as nodes."""
        values = self._values(condition.key)
        if condition.operator == LabelOperator.EXISTS:
            return self._all() - _slots_of(values, [None])
        some = _slots_of(values, condition.values)
        return self._all() - some if condition.operator == LabelOperator.NOT_IN else some

    def _all(self) -> set[int]:
        return set(self._known)

    def _values(self, key: str) -> Values:
        values = self._labels.get(key)
        if values is not None:
            self._labels.move_to_end(key)
            return values
        values = self._labels[key] = {}
        built_in = key in BUILT_IN_LABELS
        for slot, state in self._known.items():
            value = state.label(key) if built_in else state.node.labels.get(key)
            if value not in values:
                values[value] = slot
            else:
                _enter(values, value, slot)
        if len(self._labels) > _LABELS_KEPT:
            self._labels.popitem(last=False)
        return values


def _slots_of(values: Values, wanted: Iterable[str | None]) -> set[int]:
    """A new set of the slots with any of these values."""
    found: set[int] = set()
    for value in wanted:
        some = values.get(value)
        if isinstance(some, int):
            found.add(some)
        elif some is not None:
            found |= some
    return found


def _enter(values: Values, value: str | None, slot: int) -> None:
    some = values.setdefault(value, slot)
    if isinstance(some, set):
        some.add(slot)
    elif some != slot:
        values[value] = {some, slot}


def _leave(values: Values, value: str | None, slot: int) -> None:
    some = values[value]
    if isinstance(some, set):
        some.discard(slot)
        if len(some) == 1:
            values[value] = some.pop()
    else:
        del values[value]


def _one_of(slots: Mapping[int, NodeState]) -> NodeState:
    """Any of those with the same taints: in that they are alike."""
    return next(iter(slots.values()))
