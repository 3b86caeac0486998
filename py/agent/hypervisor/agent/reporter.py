"""What changed on the node, told to the control plane as it happens: batched, retried until delivered.

The queue holds at most one observation an instance (the newest wins) and is bounded by ``limit``: when it is full the
oldest is dropped and counted, since the next registration reports every instance anyway.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable

import structlog

from hypervisor.agent.cluster_link import ClusterLink, NodeDescription
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound
from hypervisor.core.model import DriverInfo, Observation
from hypervisor.core.retry import Backoff

__all__ = ["Reporter", "must_register"]

_BATCH = 500
_BACKOFF = Backoff(initial_s=0.1, maximum_s=5.0)
_UNKNOWN_HERE = frozenset({"NODE_NOT_FOUND", "LEASE_ENDED", "INCARNATION_MISMATCH"})

_log = structlog.get_logger(__name__)


def must_register(error: HypervisorError) -> bool:
    """Whether the server's answer means: register again."""
    return isinstance(error, NotFound | FailedPrecondition) and error.reason in _UNKNOWN_HERE


class Reporter:
    """Delivers observations and driver changes. ``registered`` is set while the server knows this node;
    ``register_again`` is called when it says it does not."""

    def __init__(
        self,
        node: NodeDescription,
        *,
        link: ClusterLink,
        clock: Clock,
        rng: random.Random,
        registered: asyncio.Event,
        register_again: Callable[[], None],
        limit: int = 65_536,
    ) -> None:
        self._node = node
        self._link = link
        self._clock = clock
        self._rng = rng
        self._registered = registered
        self._register_again = register_again
        self._limit = limit
        self._waiting: OrderedDict[str, Observation] = OrderedDict()
        self._drivers: tuple[DriverInfo, ...] = ()
        self._wake = asyncio.Event()
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Observations not delivered yet."""
        return len(self._waiting)

    def observation(self, seen: Observation) -> None:
        """Report it, unless a newer one of this instance waits already."""
        known = self._waiting.get(seen.instance_id)
        if known is not None and known.sequence >= seen.sequence:
            return
        self._waiting[seen.instance_id] = seen
        if len(self._waiting) > self._limit:
            instance_id, _ = self._waiting.popitem(last=False)
            self.dropped += 1
            _log.warning("observation_dropped", instance=instance_id, dropped=self.dropped)
        self._wake.set()

    def deleted(self, instance_id: str) -> None:
        """Nothing of it needs to be reported any more: the delete was asked for and is answered."""
        self._waiting.pop(instance_id, None)

    def drivers(self, infos: tuple[DriverInfo, ...]) -> None:
        """Report how the drivers are now."""
        self._drivers = infos
        self._wake.set()

    async def run(self) -> None:
        """Deliver for ever."""
        delays = _BACKOFF.delays(self._rng)
        while True:
            await self._wake.wait()
            await self._registered.wait()
            self._wake.clear()
            try:
                await self._deliver()
            except HypervisorError as exc:
                self._wake.set()
                if must_register(exc):
                    self._registered.clear()
                    self._register_again()
                    continue
                _log.warning(
                    "report_not_delivered", reason=exc.reason, error=exc.message, waiting=self.waiting
                )
                await self._clock.sleep(next(delays))
            else:
                delays = _BACKOFF.delays(self._rng)

    async def _deliver(self) -> None:
        while self._waiting or self._drivers:
            drivers, self._drivers = self._drivers, ()
            batch: list[Observation] = []
            while self._waiting and len(batch) < _BATCH:
                batch.append(self._waiting.popitem(last=False)[1])
            try:
                unexpected = await self._link.update_status(self._node, drivers=drivers, observations=batch)
            except BaseException:
                self._put_back(drivers, batch)
                raise
            if unexpected:
                _log.warning(
                    "instances_unexpected", instances=",".join(unexpected[:20]), count=len(unexpected)
                )

    def _put_back(self, drivers: tuple[DriverInfo, ...], batch: list[Observation]) -> None:
        self._drivers = self._drivers or drivers
        for seen in reversed(batch):
            if seen.instance_id not in self._waiting and len(self._waiting) < self._limit:
                self._waiting[seen.instance_id] = seen
                self._waiting.move_to_end(seen.instance_id, last=False)
