"""What a server knows of nodes besides their records: measured use and images, from the heartbeats that come to it,
and how placements have gone. Implements ``ledger.NodeFacts``.
"""

from collections.abc import Callable, Iterable

from hypervisor.core.clock import Clock
from hypervisor.core.images import IMAGE_PREFIX
from hypervisor.core.model import NodeResources
from hypervisor.server.placement_health import PlacementHealth
from hypervisor.server.services import ClusterChange, Kind

__all__ = ["ServerFacts"]

_STEP = 50
"""Loads are told apart in steps of 5 %: below that a difference is noise."""
_UNKNOWN = -1
_NO_IMAGES: frozenset[str] = frozenset()


class ServerFacts:
    """See the module's docstring. Measured use that is older than ``use_valid_s`` is not known any more.

    ``names_of`` gives the names of the images that have some content, by its digest.
    """

    def __init__(
        self,
        clock: Clock,
        health: PlacementHealth,
        *,
        use_valid_s: float,
        names_of: Callable[[str], Iterable[str]] = lambda _: (),
    ) -> None:
        self._clock = clock
        self._health = health
        self._use_valid_s = use_valid_s
        self._names_of = names_of
        self._images: dict[str, frozenset[str]] = {}
        self._loads: dict[str, tuple[int, float]] = {}
        self._changed: Callable[[str], None] = lambda _: None
        self._next_look = clock.monotonic()

    @property
    def health(self) -> PlacementHealth:
        """How placements on nodes have gone."""
        return self._health

    def listen(self, changed: Callable[[str], None]) -> None:
        """Have ``changed(node_id)`` called when a fact of a node changes."""
        self._changed = changed
        self._health.listen(changed)

    def load(self, node_id: str) -> int:
        found = self._loads.get(node_id)
        return _UNKNOWN if found is None else found[0]

    def penalty(self, node_id: str) -> int:
        return self._health.penalty(node_id)

    def images(self, node_id: str) -> frozenset[str]:
        return self._images.get(node_id, _NO_IMAGES)

    def heard(self, node_id: str, used: NodeResources, *, digests: Iterable[str] = ()) -> None:
        """A heartbeat told what is in use on the node, and which images it has."""
        load = load_of(used)
        images = frozenset(f"{IMAGE_PREFIX}{name}" for digest in digests for name in self._names_of(digest))
        changed = load != self.load(node_id) or images != self.images(node_id)
        self._loads[node_id] = (load, self._clock.monotonic())
        if images:
            self._images[node_id] = images
        else:
            self._images.pop(node_id, None)
        if changed:
            self._changed(node_id)

    def refresh(self) -> None:
        """Let time have its effect: penalties decay, and what was measured long ago is not known any more."""
        self._health.refresh()
        now = self._clock.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._use_valid_s / 2
        for node_id, (_, at) in list(self._loads.items()):
            if now - at > self._use_valid_s:
                del self._loads[node_id]
                self._images.pop(node_id, None)
                self._changed(node_id)

    def learn(self, changes: tuple[ClusterChange, ...]) -> None:
        """What the watch told: nodes that left, operations that ended."""
        for change in changes:
            if change.kind is Kind.NODE and change.current is None:
                self._loads.pop(change.object_id, None)
                self._images.pop(change.object_id, None)
        self._health.learn(changes)


def load_of(used: NodeResources) -> int:
    """The mean of the shares of processors and memory in use, in thousandths, in steps of 50."""
    shares = [
        min(max(part / whole, 0.0), 1.0)
        for part, whole in (
            (used.cpu_used_millis, used.cpu_millis),
            (used.memory_used_bytes, used.memory_bytes),
        )
        if whole > 0
    ]
    return round(sum(shares) / len(shares) * 1000 / _STEP) * _STEP if shares else _UNKNOWN
