"""Columns of the node table that the table cannot fill itself: what they say of a node, and which of them are kept."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from hypervisor.core.model import LabelConstraint, Toleration
from hypervisor.core.resources import ZERO
from hypervisor.core.states import InstanceType, PlacementPolicy
from hypervisor.server.scheduler.case import Case
from hypervisor.server.scheduler.contract import NodeState, Request, Snapshot
from hypervisor.server.scheduler.plugins import LabelsMatch, PinnedNode, Taints, TaintsTolerated

__all__ = ["Columns", "Static"]

_NOTHING = Snapshot({})
_TOLERATED = TaintsTolerated()
_STATIC_FILTERS = (PinnedNode(), LabelsMatch(), _TOLERATED)
_MILD = Taints()
K = TypeVar("K")


@dataclass(frozen=True)
class Static:
    """What a request asks of a node's record, however full the node and the cluster are."""

    node: str
    constraints: tuple[LabelConstraint, ...]
    tolerations: tuple[Toleration, ...]

    def eligible(self, state: NodeState) -> bool:
        """Whether the node passes the filters that look at its record alone."""
        return all(one.reason_against(self._case, state) is None for one in _STATIC_FILTERS)

    def tolerates(self, state: NodeState) -> bool:
        """Whether the node passes the filter of taints."""
        return _TOLERATED.reason_against(self._case, state) is None

    def mildness(self, state: NodeState) -> int:
        """What the score ``taints`` says of the node."""
        return _MILD.score(self._case, state)

    @cached_property
    def _case(self) -> Case:
        return Case(
            Request(
                InstanceType.CONTAINER,
                ZERO,
                PlacementPolicy.SPREAD,
                constraints=self.constraints,
                node=self.node,
                tolerations=self.tolerations,
            ),
            _NOTHING,
        )


class Columns(Generic[K]):
    """Columns of the table by what they are for, the least lately used forgotten."""

    def __init__(
        self, most: int, add: Callable[[], int], drop: Callable[[int], None], *, forgot: Callable[[], None]
    ) -> None:
        self._most = most
        self._add = add
        self._drop = drop
        self._forgot = forgot
        self._kept: OrderedDict[K, int] = OrderedDict()

    def items(self) -> Iterable[tuple[K, int]]:
        """What there is, by purpose."""
        return self._kept.items()

    def columns(self) -> Iterable[int]:
        """Ids of the columns."""
        return self._kept.values()

    def of(self, purpose: K, fill: Callable[[int], None]) -> int:
        """The column for the purpose, filled if it is new."""
        column = self._kept.get(purpose)
        if column is not None:
            self._kept.move_to_end(purpose)
            return column
        column = self._add()
        fill(column)
        self._kept[purpose] = column
        if len(self._kept) > self._most:
            _, old = self._kept.popitem(last=False)
            self._drop(old)
            self._forgot()
        return column
