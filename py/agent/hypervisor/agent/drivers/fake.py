"""The fake driver: the whole contract without a runtime, for simulated nodes and for tests of everything above it.

Instances live in memory and, with ``state_dir``, outlive the agent's process as real ones do. Each runs a tiny guest
(fake_guest.py) whose command may end it: ``("exit", "3")``, ``("sleep", "2")``, ``("echo", "hello")``. The images
``missing`` and ``invalid`` are refused. What else goes wrong is told by :class:`FakeFaults`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from hypervisor.agent.drivers import fake_snapshots
from hypervisor.agent.drivers.driver import VERBS, Assignment, Handle
from hypervisor.agent.drivers.fake_faults import FakeFaults
from hypervisor.agent.drivers.fake_guest import FakeTerminal, Guest, GuestEnd
from hypervisor.agent.drivers.fake_instance import FakeConsole, FakeInstance, figures_of, not_running, observe
from hypervisor.agent.drivers.fake_state import FakeRecord, FakeStateDirectory
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, InvalidArgument, NotFound
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Capability, DriverInfo, Observation, Sizes
from hypervisor.core.resources import MIB
from hypervisor.core.states import InstanceType

__all__ = ["FakeConfig", "FakeDriver"]

_EVENTS_KEPT = 10_000
_SIGTERM_EXIT = 143
_SIGKILL_EXIT = 137


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeConfig:
    """``lacks``: verbs it does not have, with the reason. ``action_s``: how long each action takes."""

    types: tuple[InstanceType, ...] = tuple(InstanceType)
    state_dir: Path | None = None
    lacks: tuple[tuple[str, str], ...] = ()
    action_s: float = 0.0


class FakeDriver:
    """See the module's docstring. What an earlier process left in ``state_dir`` is read with the first call."""

    name = "fake"

    def __init__(self, config: FakeConfig, *, clock: Clock, faults: FakeFaults | None = None) -> None:
        self._config = config
        self._clock = clock
        self.faults = faults or FakeFaults()
        self.faults.on_change(self._runtime_changed)
        self._instances: dict[str, FakeInstance] = {}
        self._state = FakeStateDirectory(config.state_dir) if config.state_dir is not None else None
        self._loaded = self._state is None
        self._loading = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._events: deque[Observation] = deque(maxlen=_EVENTS_KEPT)
        self._event_waits = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- the contract ------------------------------------------------------------------------------------------

    async def create(self, assignment: Assignment) -> Handle:
        await self._enter("create")
        self._check_spec(assignment)
        instance_id = assignment.instance_id
        if instance_id not in self._instances:
            self._instances[instance_id] = self._instance(FakeRecord(assignment=assignment))
        await self._save(instance_id)
        return {"fake_id": instance_id}

    async def start(self, instance_id: str) -> Observation:
        await self._enter("start")
        instance = self._find(instance_id)
        if not instance.record.running:
            record = instance.record
            record.running, record.started_at, record.finished_at = True, self._clock.now(), None
            record.exit_code, record.oom, record.requested = None, False, False
            record.suspended = False
            self._boot(instance)
            await self._save(instance_id)
        return self._observe(instance)

    async def stop(self, instance_id: str, *, grace_s: float) -> Observation:
        await self._enter("stop")
        instance = self._find(instance_id)
        if instance.record.running:
            self._end(instance, _SIGTERM_EXIT if grace_s > 0 else _SIGKILL_EXIT, requested=True)
            await self._save(instance_id)
        return self._observe(instance)

    async def restart(self, instance_id: str, *, grace_s: float) -> Observation:
        await self._enter("restart")
        await self.stop(instance_id, grace_s=grace_s)
        return await self.start(instance_id)

    async def update(self, instance_id: str, sizes: Sizes) -> Observation:
        await self._enter("update")
        instance = self._find(instance_id)
        assignment = instance.record.assignment
        instance.record.assignment = msgspec.structs.replace(assignment, spec=sizes.of(assignment.spec))
        await self._save(instance_id)
        return self._observe(instance)

    async def pause(self, instance_id: str) -> Observation:
        return await self._freeze(instance_id, paused=True)

    async def resume(self, instance_id: str) -> Observation:
        return await self._freeze(instance_id, paused=False)

    async def suspend(self, instance_id: str) -> Observation:
        await self._enter("suspend")
        instance = self._find(instance_id)
        if instance.record.suspended:
            return self._observe(instance)
        if not instance.record.running:
            raise not_running(instance_id)
        self._end(instance, None, requested=True, suspended=True)
        await self._save(instance_id)
        return self._observe(instance)

    async def create_snapshot(self, instance_id: str, name: str, *, kind: SnapshotKind) -> Snapshot:
        await self._enter("create_snapshot")
        made = fake_snapshots.keep(self._find(instance_id).record, name, kind=kind, now=self._clock.now())
        await self._save(instance_id)
        return made

    async def list_snapshots(self, instance_id: str) -> tuple[Snapshot, ...]:
        await self._enter("list_snapshots")
        return tuple(kept.snapshot for kept in self._find(instance_id).record.snapshots)

    async def restore_snapshot(self, instance_id: str, name: str) -> Observation:
        await self._enter("restore_snapshot")
        instance = self._find(instance_id)
        kept = fake_snapshots.find(instance.record, name)
        if not kept.running:
            if instance.record.running:
                self._end(instance, None, requested=True)
        else:
            if not instance.record.running:
                await self.start(instance_id)
            await self._freeze(instance_id, paused=kept.paused)
        await self._save(instance_id)
        return self._observe(instance)

    async def delete_snapshot(self, instance_id: str, name: str) -> bool:
        await self._enter("delete_snapshot")
        existed = fake_snapshots.forget(self._find(instance_id).record, name)
        await self._save(instance_id)
        return existed

    async def delete(self, instance_id: str) -> bool:
        await self._enter("delete")
        instance = self._instances.get(instance_id)
        if instance is None:
            return False
        if instance.record.running:
            self._end(instance, _SIGKILL_EXIT, requested=True)
        if instance.console is not None:
            await instance.console.close()
        del self._instances[instance_id]
        if self._state is not None:
            async with self._saving:
                await asyncio.to_thread(self._state.remove, instance_id)
        return True

    async def get(self, instance_id: str) -> Observation:
        await self._enter("get")
        return self._observe(self._find(instance_id))

    async def list(self) -> tuple[Observation, ...]:
        await self._enter("list")
        return tuple(self._observe(instance) for instance in self._instances.values())

    async def stats_source(self, instance_id: str) -> "FakeDriver":
        """The driver itself is the feed of its instances' figures."""
        await self._enter("stats")
        instance = self._find(instance_id)
        if not instance.record.running or instance.guest is None:
            raise not_running(instance_id)
        return self

    async def read(self, instance_ids: Sequence[str]) -> dict[str, dict[str, int]]:
        """See ``StatsFeed``: made-up figures of those that run. Its faults are those of the verb ``feed``."""
        await self._enter("feed")
        found = {}
        for instance_id in instance_ids:
            instance = self._instances.get(instance_id)
            if instance is not None and instance.record.running and instance.guest is not None:
                found[instance_id] = figures_of(instance, instance.guest, now=self._clock.monotonic())
        return found

    async def attach(self, instance_id: str) -> FakeConsole:
        await self._enter("console")
        instance = self._find(instance_id)
        if not instance.record.running and not instance.terminal.unread:
            raise not_running(instance_id)
        if instance.console is not None:
            raise FailedPrecondition(
                f"the console of {instance_id} is attached already: close that attachment first",
                reason="CONSOLE_ATTACHED",
                metadata={"instance": instance_id},
            )
        instance.console = FakeConsole(instance)
        return instance.console

    async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
        await self._enter("recover")
        instance = self._instances.get(instance_id)
        return None if instance is None else self._observe(instance)

    async def events(self) -> AsyncIterator[Observation]:
        while True:
            self._event_waits.clear()
            self.faults.check_runtime()
            if self._events:
                yield self._events.popleft()
                continue
            await self._event_waits.wait()

    async def info(self) -> DriverInfo:
        lacks = dict(self._config.lacks)
        down = self.faults.down
        if down is None:
            await self.faults.pass_through("info", clock=self._clock)
        return DriverInfo(
            name=self.name,
            types=self._config.types,
            available=down is None,
            reason=down or "",
            version="fake 1",
            capabilities=tuple(
                Capability(verb=verb, supported=verb not in lacks, reason=lacks.get(verb, ""))
                for verb in VERBS
            ),
        )

    async def aclose(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for instance in self._instances.values():
            if instance.console is not None:
                await instance.console.close()

    # -- on demand ---------------------------------------------------------------------------------------------

    async def exit(self, instance_id: str, exit_code: int) -> None:
        """The instance ends by itself."""
        await self._end_by_itself(instance_id, GuestEnd(exit_code))

    async def oom(self, instance_id: str) -> None:
        """The instance is killed for lack of memory."""
        await self._end_by_itself(instance_id, GuestEnd(_SIGKILL_EXIT, oom=True))

    def vanish(self, instance_id: str) -> None:
        """The runtime loses the instance, without an event: as after a machine that lost its disk."""
        del self._instances[instance_id]

    # -- inside ------------------------------------------------------------------------------------------------

    async def _enter(self, verb: str) -> None:
        await self.faults.pass_through(verb, clock=self._clock)
        if verb in ("create", "start", "stop", "delete") and self._config.action_s > 0:
            await self._clock.sleep(self._config.action_s)
        if not self._loaded:
            await self._load()

    async def _load(self) -> None:
        async with self._loading:
            if self._loaded or self._state is None:
                return
            for record in await asyncio.to_thread(self._state.load):
                instance = self._instance(record)
                self._instances[record.assignment.instance_id] = instance
                if record.running:
                    self._boot(instance, resumed=True)
            self._loaded = True

    async def _save(self, instance_id: str) -> None:
        instance = self._instances.get(instance_id)
        if self._state is None or instance is None:
            return
        async with self._saving:
            data = FakeStateDirectory.encode(instance.record)
            await asyncio.to_thread(self._state.save, instance_id, data)

    def _instance(self, record: FakeRecord) -> FakeInstance:
        wake = asyncio.Event()
        return FakeInstance(record, FakeTerminal(wake.set), wake)

    def _check_spec(self, assignment: Assignment) -> None:
        image = assignment.spec.image
        if assignment.type is InstanceType.CONTAINER and not image:
            raise InvalidArgument.of_field("spec.image", "is required for containers", reason="IMAGE_INVALID")
        if image == "invalid":
            raise InvalidArgument.of_field("spec.image", "is not an image", reason="IMAGE_INVALID")
        if image == "missing":
            raise NotFound(
                "the image missing is not on this node: import it first",
                reason="IMAGE_NOT_FOUND",
                metadata={"image": image},
            )

    def _boot(self, instance: FakeInstance, *, resumed: bool = False) -> None:
        record = instance.record
        instance.used = None
        guest = Guest(
            instance.terminal,
            memory_limit_bytes=record.assignment.spec.memory_mb * MIB,
            ended=lambda end: self._guest_ended(instance, guest, end),
        )
        instance.guest = guest
        lives_s = guest.boot(record.assignment.spec.command)
        if record.paused:
            guest.freeze()
        if lives_s is not None and guest.alive:
            if resumed and record.started_at is not None:
                lives_s -= (self._clock.now() - record.started_at) / timedelta(seconds=1)
            instance.timer = self._spawn(self._expire(guest, lives_s))

    async def _expire(self, guest: Guest, lives_s: float) -> None:
        await self._clock.sleep(max(lives_s, 0.0))
        guest.end(0)

    def _guest_ended(self, instance: FakeInstance, guest: Guest, end: GuestEnd) -> None:
        if instance.guest is not guest or not instance.record.running:
            return
        self._end(instance, end.exit_code, oom=end.oom)
        self._spawn(self._save(instance.record.assignment.instance_id))

    async def _freeze(self, instance_id: str, *, paused: bool) -> Observation:
        await self._enter("pause" if paused else "resume")
        instance = self._find(instance_id)
        if not instance.record.running or instance.guest is None:
            raise not_running(instance_id)
        if instance.record.paused is not paused:
            instance.record.paused = paused
            if paused:
                instance.guest.freeze()
            else:
                instance.guest.thaw()
            await self._save(instance_id)
        return self._observe(instance)

    async def _end_by_itself(self, instance_id: str, end: GuestEnd) -> None:
        instance = self._find(instance_id)
        if instance.guest is None or not instance.record.running:
            raise not_running(instance_id)
        instance.guest.alive = False
        self._end(instance, end.exit_code, oom=end.oom)
        await self._save(instance_id)

    def _end(
        self,
        instance: FakeInstance,
        exit_code: int | None,
        *,
        oom: bool = False,
        requested: bool = False,
        suspended: bool = False,
    ) -> None:
        record = instance.record
        record.paused, record.suspended = False, suspended
        record.running, record.finished_at = False, self._clock.now()
        record.exit_code, record.oom, record.requested = exit_code, oom, requested
        if instance.guest is not None:
            instance.guest.alive = False
        if instance.timer is not None:
            instance.timer.cancel()
            instance.timer = None
        instance.wake.set()
        if self.faults.down is None:  # Else `events` begins again with everything once the runtime is back.
            self._events.append(self._observe(instance))
            self._event_waits.set()

    def _runtime_changed(self) -> None:
        self._events.clear()
        if self.faults.down is None:
            self._events.extend(self._observe(instance) for instance in self._instances.values())
        self._event_waits.set()

    def _observe(self, instance: FakeInstance) -> Observation:
        return observe(instance.record, now=self._clock.now())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _find(self, instance_id: str) -> FakeInstance:
        instance = self._instances.get(instance_id)
        if instance is None:
            raise NotFound(
                f"the fake runtime has no instance {instance_id}",
                reason="INSTANCE_NOT_FOUND",
                metadata={"instance": instance_id},
            )
        return instance
