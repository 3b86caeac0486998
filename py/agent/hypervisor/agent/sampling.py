"""The newest statistics of running instances, for the heartbeat: best effort, bounded in time and concurrency."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import InstanceStats

__all__ = ["StatsSampler"]

_AT_ONCE = 16

_log = structlog.get_logger(__name__)


class StatsSampler:
    """Asks for a sample of every running instance. One that fails or comes too late is left out."""

    def __init__(
        self,
        *,
        running: Callable[[], tuple[str, ...]],
        stats: Callable[[str], Awaitable[InstanceStats]],
        timeout_s: float = 2.0,
    ) -> None:
        self._running = running
        self._stats = stats
        self._timeout_s = timeout_s

    async def sample(self) -> dict[str, InstanceStats]:
        """Samples by instance id."""
        samples: dict[str, InstanceStats] = {}
        waiting = list(reversed(self._running()))

        async def worker() -> None:
            while waiting:
                instance_id = waiting.pop()
                try:
                    samples[instance_id] = await self._stats(instance_id)
                except HypervisorError as exc:
                    # It may just have stopped; and the next heartbeat brings the next sample.
                    _log.debug("stats_not_sampled", instance=instance_id, reason=exc.reason)

        try:
            async with asyncio.timeout(self._timeout_s), asyncio.TaskGroup() as group:
                for _ in range(min(_AT_ONCE, len(waiting))):
                    group.create_task(worker())
        except TimeoutError:
            _log.warning("stats_sampling_slow", sampled=len(samples), left_out=len(waiting))
        return samples
