"""All console hubs of the node: one comes with each instance and goes with it. Their connection to the holder."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from hypervisor.agent.console import ConsoleHub, ConsoleLimits
from hypervisor.agent.console_holder import protocol
from hypervisor.agent.console_holder.client import HolderClient
from hypervisor.agent.console_holder.launching import Launcher
from hypervisor.agent.console_items import End
from hypervisor.agent.drivers.driver import Console
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, NotFound
from hypervisor.core.model import Observation

__all__ = ["ConsoleHubs"]

_log = structlog.get_logger(__name__)


class ConsoleHubs:
    """Told of instances by the manager; :meth:`run` must be running for output to be drained."""

    def __init__(
        self,
        *,
        attach: Callable[[str], Awaitable[Console]],
        launcher: Launcher,
        limits: ConsoleLimits,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._attach = attach
        self._limits = limits
        self._clock = clock
        self._rng = rng
        self._holder = HolderClient(launcher, clock=clock, rng=rng, on_event=self._event)
        self._hubs: dict[str, ConsoleHub] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Keep consoles attached until :meth:`detach_all` or cancellation. The holder goes on."""
        async with asyncio.TaskGroup() as outer:
            holding = outer.create_task(self._holder.run())
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
                # Viewers were let go before; what they have not got yet is in their connections.
                holding.cancel()

    async def retain(self, instance_ids: frozenset[str]) -> None:
        """These are all instances of the node, seen or not: what is kept of others goes."""
        try:
            await self._holder.retain(tuple(instance_ids | self._hubs.keys()))
        except HypervisorError as exc:
            # They are found again with the next start.
            _log.warning("consoles_not_tidied", reason=exc.reason)

    def observed(self, seen: Observation) -> None:
        """An instance is now so."""
        hub = self._hubs.get(seen.instance_id)
        if hub is None:
            hub = self._hubs[seen.instance_id] = ConsoleHub(
                seen.instance_id,
                attach=self._attach,
                holder=self._holder,
                limits=self._limits,
                clock=self._clock,
                rng=self._rng,
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
        if self._group is not None:
            self._group.create_task(self._forget(instance_id))

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

    def _event(self, event: protocol.Event) -> None:
        match event:
            case protocol.RunEnded(console=console, run=run, position=position):
                if console in self._hubs:
                    self._hubs[console].run_ended(run, position)
            case protocol.LogFailed(console=console, reason=reason):
                _log.error("console_log_failed", instance=console, error=reason)

    async def _forget(self, instance_id: str) -> None:
        try:
            await self._holder.forget(instance_id, 0)
        except HypervisorError as exc:
            # The next agent's `retain` finds it.
            _log.warning("console_not_forgotten", instance=instance_id, reason=exc.reason)

    async def _contained(self, hub: ConsoleHub) -> None:
        try:
            await hub.run()
        except Exception:
            # A defect of ours in one console must not take the node's other consoles along.
            _log.exception("console_defect", instance=hub.instance_id)
            hub.end(End.DETACHED)
