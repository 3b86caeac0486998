"""The node's membership: register, send heartbeats, register again when the server forgot the node.

The node works on while no server can be reached; this loop just keeps trying.
"""

import asyncio
import random
from collections.abc import Callable, Iterable

import structlog

from hypervisor.agent.cluster_link import ClusterLink, HeartbeatTimes, NodeDescription
from hypervisor.agent.fencing.lease import Lease
from hypervisor.agent.reporter import must_register
from hypervisor.agent.resources import ResourceSource
from hypervisor.agent.stats.service import StatsService
from hypervisor.core.availability import NodeFencing
from hypervisor.core.clock import Clock
from hypervisor.core.errors import DeadlineExceeded, HypervisorError, Unavailable
from hypervisor.core.model import DriverInfo, NodeResources, Observation
from hypervisor.core.retry import Backoff

__all__ = ["HEARTBEAT_SAMPLES", "Membership"]

HEARTBEAT_SAMPLES = 2000
"""Most samples a heartbeat carries: some 400 KB. See HeartbeatRequest in cluster.proto."""

_HEARTBEAT_IMAGES = 1000
"""Most digests of images it carries: 66 KB."""

_BACKOFF = Backoff(initial_s=0.2, maximum_s=5.0)

_log = structlog.get_logger(__name__)


class Membership:
    """See the module's docstring. ``registered`` is set while the server knows this node."""

    def __init__(
        self,
        node: NodeDescription,
        *,
        link: ClusterLink,
        resources: ResourceSource,
        stats: StatsService,
        drivers: Callable[[], tuple[DriverInfo, ...]],
        observations: Callable[[], tuple[Observation, ...]],
        clock: Clock,
        rng: random.Random,
        registered: asyncio.Event,
        default_interval_s: float,
        images: Callable[[], Iterable[str]] = lambda: (),
        lease: Lease | None = None,
        fencing: Callable[[], NodeFencing | None] = lambda: None,
    ) -> None:
        self._node = node
        self._link = link
        self._resources = resources
        self._stats = stats
        self._drivers = drivers
        self._observations = observations
        self._clock = clock
        self._rng = rng
        self._registered = registered
        self._interval_s = default_interval_s
        self._default_interval_s = default_interval_s
        self._images = images
        self._lease = lease
        self._fencing = fencing
        self._again = asyncio.Event()

    def register_again(self) -> None:
        """The server does not know this node any more."""
        self._again.set()

    async def run(self) -> None:
        """Keep the node registered for ever."""
        while True:
            await self._register()
            await self._heartbeats()
            self._registered.clear()

    async def _register(self) -> None:
        delays = _BACKOFF.delays(self._rng)
        while True:
            self._again.clear()
            sent_s = self._clock.monotonic()
            try:
                times = await self._link.register(
                    self._node,
                    resources=await self._read_resources(),
                    drivers=self._drivers(),
                    observations=self._observations(),
                    fencing=self._fencing(),
                )
            except HypervisorError as exc:
                level = _log.warning if isinstance(exc, Unavailable | DeadlineExceeded) else _log.error
                level("register_failed", node=self._node.id, reason=exc.reason, error=exc.message)
                await self._clock.sleep(
                    max(next(delays), exc.retry_after_s or 0.0) * self._rng.uniform(1.0, 1.25)
                )
            else:
                self._take(times)
                if self._lease is not None:
                    self._lease.registered(sent_s, time_to_live_s=times.timeout_s, disarmed=times.disarmed)
                self._registered.set()
                _log.info("registered", node=self._node.id, hostname=self._node.hostname)
                return

    async def _heartbeats(self) -> None:
        """Until the server wants a new registration."""
        # Many agents that start together shall not beat together.
        wait_s = self._interval_s * self._rng.uniform(0.5, 1.0)
        delays = _BACKOFF.delays(self._rng)
        while True:
            await self._pause(wait_s)
            if self._again.is_set():
                _log.info("register_again", node=self._node.id)
                return
            started = self._clock.monotonic()
            try:
                times = await self._link.heartbeat(
                    self._node,
                    resources=await self._read_resources(),
                    usage=self._stats.usage(),
                    stats=self._stats.newest(limit=HEARTBEAT_SAMPLES),
                    images=sorted(self._images())[:_HEARTBEAT_IMAGES],
                    fencing=self._fencing(),
                )
            except HypervisorError as exc:
                if must_register(exc):
                    _log.warning("register_again", node=self._node.id, reason=exc.reason)
                    return
                _log.warning("heartbeat_failed", reason=exc.reason, error=exc.message)
                # Sooner than the next beat is due: the lease must not end because one server did.
                wait_s = min(next(delays), self._interval_s)
            else:
                self._take(times)
                if self._lease is not None:
                    self._lease.answered(started, time_to_live_s=times.timeout_s, disarmed=times.disarmed)
                delays = _BACKOFF.delays(self._rng)
                wait_s = max(self._interval_s - (self._clock.monotonic() - started), 0.0)

    async def _pause(self, seconds: float) -> None:
        """Sleep, or less when the reporter learned that the node must register again."""
        sleeper = asyncio.ensure_future(self._clock.sleep(seconds))
        waker = asyncio.ensure_future(self._again.wait())
        try:
            await asyncio.wait({sleeper, waker}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeper.cancel()
            waker.cancel()
            await asyncio.gather(sleeper, waker, return_exceptions=True)

    async def _read_resources(self) -> NodeResources:
        return await self._resources.read()

    def _take(self, times: HeartbeatTimes) -> None:
        self._interval_s = times.interval_s or self._default_interval_s
