"""All console hubs of the node: one comes with each instance and goes with it."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from hypervisor.agent.console import ConsoleHub, End
from hypervisor.agent.drivers.driver import Console
from hypervisor.core.clock import Clock
from hypervisor.core.errors import NotFound
from hypervisor.core.model import Observation

__all__ = ["ConsoleHubs"]

_log = structlog.get_logger(__name__)


class ConsoleHubs:
    """Told of instances by the manager; :meth:`run` must be running for output to be drained."""

    def __init__(
        self,
        *,
        attach: Callable[[str], Awaitable[Console]],
        clock: Clock,
        rng: random.Random,
        scrollback_bytes: int,
    ) -> None:
        self._attach = attach
        self._clock = clock
        self._rng = rng
        self._scrollback_bytes = scrollback_bytes
        self._hubs: dict[str, ConsoleHub] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Drain consoles until :meth:`detach_all` or cancellation."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for instance_id, hub in self._hubs.items():
                    self._tasks[instance_id] = group.create_task(self._contained(hub))
                await self._stopped.wait()
                for task in self._tasks.values():
                    task.cancel()
        finally:
            self._group = None

    def observed(self, seen: Observation) -> None:
        """An instance is now so."""
        hub = self._hubs.get(seen.instance_id)
        if hub is None:
            hub = self._hubs[seen.instance_id] = ConsoleHub(
                seen.instance_id,
                attach=self._attach,
                clock=self._clock,
                rng=self._rng,
                scrollback_bytes=self._scrollback_bytes,
            )
            if self._group is not None:
                self._tasks[seen.instance_id] = self._group.create_task(self._contained(hub))
        hub.observed(seen)

    def deleted(self, instance_id: str) -> None:
        """An instance is gone: its viewers end."""
        hub = self._hubs.pop(instance_id, None)
        if hub is not None:
            hub.end(End.DELETED)
        task = self._tasks.pop(instance_id, None)
        if task is not None:
            task.cancel()

    def hub(self, instance_id: str) -> ConsoleHub:
        """The console of an instance. NotFound (``INSTANCE_NOT_FOUND``)."""
        hub = self._hubs.get(instance_id)
        if hub is None:
            raise NotFound(
                f"instance {instance_id} is not on this node",
                reason="INSTANCE_NOT_FOUND",
                metadata={"instance": instance_id},
            )
        return hub

    def detach_all(self) -> None:
        """The agent stops: let all viewers go and the terminals free."""
        for hub in self._hubs.values():
            hub.end(End.DETACHED)
        self._stopped.set()

    async def _contained(self, hub: ConsoleHub) -> None:
        try:
            await hub.run()
        except Exception:
            # A defect of ours in one console must not take the node's other consoles along.
            _log.exception("console_defect", instance=hub.instance_id)
            hub.end(End.DETACHED)
