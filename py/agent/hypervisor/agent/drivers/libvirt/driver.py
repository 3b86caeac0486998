"""The libvirt driver: the ``Driver`` contract, and its powers, over the other modules of this package."""

import asyncio
import contextlib
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from xml.etree import ElementTree

import structlog
from msgspec.structs import replace

from hypervisor.agent.drivers.driver import ASK_AGAIN_S, VERBS, Assignment, Console, Handle
from hypervisor.agent.drivers.fifo_console import FifoConsole
from hypervisor.agent.drivers.libvirt.accelerator import Accelerator, probe_kvm
from hypervisor.agent.drivers.libvirt.building import Builder
from hypervisor.agent.drivers.libvirt.config import LibvirtConfig
from hypervisor.agent.drivers.libvirt.connection import Connection, DomainEvent
from hypervisor.agent.drivers.libvirt.console import PipeFifos
from hypervisor.agent.drivers.libvirt.events import EventFeed, EventHandlers
from hypervisor.agent.drivers.libvirt.machines import Machines
from hypervisor.agent.drivers.libvirt.observing import Phase
from hypervisor.agent.drivers.libvirt.record import Record
from hypervisor.agent.drivers.libvirt.resizing import Resizing
from hypervisor.agent.drivers.libvirt.snapshots import Snapshots
from hypervisor.agent.drivers.libvirt.specification import check
from hypervisor.agent.drivers.libvirt.stats import DomainStats
from hypervisor.agent.drivers.libvirt.tracking import DRIVER_NAME, Tracker
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Capability, DriverInfo, Observation, Sizes
from hypervisor.core.states import InstanceStatus, InstanceType

__all__ = ["LibvirtDriver"]

_STOP_POLL_S = 0.1
_LACKS = {
    "resize": "the console is a serial line, which has no size",
    "oom-events": "what the guest's kernel kills for lack of memory it tells nobody outside",
    "snapshot-diff": "libvirt keeps whole snapshots only",
}

_log = structlog.get_logger(__name__)


class LibvirtDriver:
    """See hypervisor.agent.drivers.driver. Owns its connection; ``aclose`` ends it and leaves guests running."""

    def __init__(self, config: LibvirtConfig, *, clock: Clock, rng: random.Random) -> None:
        self._config = config
        self._clock = clock
        self._connection = Connection(config.uri, listener=self._on_event)
        self._machines = Machines(self._connection, home=config.data_dir)
        self._fifos = PipeFifos(config.consoles, buffer_bytes=config.console_buffer_bytes)
        self._tracker = Tracker(self._machines, self._fifos, clock=clock, uri=config.uri)
        self._builder = Builder(config, self._machines, self._fifos)
        self._resizing = Resizing(self._tracker, self._machines)
        self._snapshots = Snapshots(self._tracker, self._machines, self._fifos, clock=clock)
        self._stats = DomainStats(self._connection)
        self._probing = asyncio.Lock()
        self._accelerator: Accelerator | None = None
        self._feed = EventFeed(
            self._connection,
            EventHandlers(
                on_event=self._tracker.on_event, resync=self._tracker.resync, look=self._tracker.look
            ),
            clock=clock,
            rng=rng,
        )

    def _on_event(self, event: DomainEvent) -> None:
        self._feed.deliver(event)

    @property
    def name(self) -> str:
        """``libvirt``."""
        return DRIVER_NAME

    # Create and delete.

    async def create(self, assignment: Assignment) -> Handle:
        """Check the specification, take over its files, make disk and seed, define the domain."""
        wanted = check(assignment, self._config)
        accelerator = await self._accelerate()
        sources = await self._builder.take_over(assignment)
        instance_id = assignment.instance_id
        record = Record(
            instance_id=instance_id,
            generation=assignment.generation,
            epoch=assignment.epoch,
            name=assignment.name,
            project=assignment.project,
            home=self._machines.home,
            files=sources.files,
            image=sources.image,
            has_disk=sources.has_disk,
            uefi=wanted.uefi,
            accelerator=accelerator.kind,
            accelerator_reason=accelerator.reason,
        )
        async with self._tracker.locks.hold(instance_id):
            making = asyncio.ensure_future(self._builder.make(assignment, wanted, sources, record))
            try:
                new = await uninterrupted(making)
            except asyncio.CancelledError:
                if not making.cancelled() and making.exception() is None and making.result():
                    await self._builder.undo(instance_id)
                raise
            # Nothing is awaited any more: a cancellation now would leave it behind.
            if new:
                self._tracker.live_of(instance_id).told = (InstanceStatus.STOPPED, "")
        return {"domain": instance_id, "uri": self._config.uri}

    async def delete(self, instance_id: str) -> bool:
        """End and remove it; the definition goes last, so that an interrupted delete can be repeated."""
        async with self._tracker.locks.hold(instance_id):
            return await uninterrupted(self._delete(instance_id))

    async def _delete(self, instance_id: str) -> bool:
        live = self._tracker.live.pop(instance_id, None)
        found = await self._machines.find(instance_id)
        existed = found is not None
        if found is not None and found.state.phase is not Phase.OFF:
            await self._machines.destroy(instance_id)
        if live is not None and live.console is not None:
            await live.console.close()
        existed |= await asyncio.to_thread(_remove, self._config.instances / instance_id)
        existed |= await asyncio.to_thread(self._fifos.remove, instance_id)
        if found is not None:
            await self._machines.undefine(instance_id)
        self._tracker.live.pop(instance_id, None)
        await self._builder.sweep()
        return existed

    # Start and stop.

    async def start(self, instance_id: str) -> Observation:
        """Start it, or go on from its saved memory."""
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.find(instance_id)
            if found.state.phase is not Phase.OFF:
                return self._tracker.observe(found)
            return await uninterrupted(self._start(found.record))

    async def _start(self, record: Record) -> Observation:
        instance_id = record.instance_id
        self._tracker.live_of(instance_id).panicked = False
        self._fifos.make(instance_id)
        started = replace(record, started_at=self._clock.now(), stop_asked=False, end=None)
        try:
            await self._machines.start(started)
        except HypervisorError:
            self._fifos.release(instance_id)
            raise
        return await self._tracker.told(instance_id)

    async def stop(self, instance_id: str, *, grace_s: float) -> Observation:
        """The power button, then an end by force."""
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.find(instance_id)
            requested = found.state.phase is not Phase.OFF
            if requested:
                await self._tracker.note_stop(found.record)
                await self._end_politely(instance_id, found.state.phase, grace_s=grace_s)
            observation = await self._tracker.settle(instance_id, requested=requested)
            if requested:
                self._fifos.release(instance_id)
            return observation

    async def _end_politely(self, instance_id: str, phase: Phase, *, grace_s: float) -> None:
        if grace_s > 0 and phase is Phase.RUNNING:
            deadline = self._clock.monotonic() + grace_s
            press_at = self._clock.monotonic()
            while (now := self._clock.monotonic()) < deadline:
                if now >= press_at:
                    await self._press_power_button(instance_id)
                    press_at = now + ASK_AGAIN_S
                if (await self._tracker.find(instance_id)).state.phase is Phase.OFF:
                    return
                await self._clock.sleep(min(_STOP_POLL_S, max(0.0, deadline - self._clock.monotonic())))
            _log.info("vm_stop_forced", instance_id=instance_id, grace_s=grace_s)
        await uninterrupted(self._machines.destroy(instance_id))

    async def _press_power_button(self, instance_id: str) -> None:
        try:
            await self._machines.press_power_button(instance_id)
        except FailedPrecondition as exc:
            # It ended a moment ago, or is not ready for it; the rest finds out.
            _log.info("power_button_refused", instance_id=instance_id, error=exc.message)

    async def restart(self, instance_id: str, *, grace_s: float) -> Observation:
        """Stop and start; memory saved by a suspend is dropped."""
        stopped = await self.stop(instance_id, grace_s=grace_s)
        if stopped.reason == "SUSPENDED":
            async with self._tracker.locks.hold(instance_id):
                await self._machines.drop_saved(instance_id)
        return await self.start(instance_id)

    # Powers.

    async def update(self, instance_id: str, sizes: Sizes) -> Observation:
        """See :class:`.resizing.Resizing`."""
        return await self._resizing.update(instance_id, sizes)

    async def pause(self, instance_id: str) -> Observation:
        """Freeze its processors."""
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.running(instance_id)
            if found.state.phase is Phase.RUNNING:
                await uninterrupted(self._machines.pause(instance_id))
            return await self._tracker.told(instance_id)

    async def resume(self, instance_id: str) -> Observation:
        """Let its processors go on."""
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.running(instance_id)
            if found.state.phase is Phase.PAUSED:
                await uninterrupted(self._machines.resume(instance_id))
            return await self._tracker.told(instance_id)

    async def suspend(self, instance_id: str) -> Observation:
        """Write its memory to disk and end it."""
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.find(instance_id)
            if found.state.phase is Phase.OFF:
                if found.state.saved:
                    return await self._tracker.settle(instance_id, requested=True)
                raise self._tracker.not_running(instance_id)
            return await uninterrupted(self._suspend(found.record))

    async def _suspend(self, record: Record) -> Observation:
        await self._tracker.note_stop(record)
        try:
            await self._machines.save(record.instance_id)
        except HypervisorError:
            # It runs on, and an end that comes now is none that was asked for.
            await self._machines.write_record(record)
            raise
        observation = await self._tracker.settle(record.instance_id, requested=True)
        self._fifos.release(record.instance_id)
        return observation

    async def create_snapshot(self, instance_id: str, name: str, *, kind: SnapshotKind) -> Snapshot:
        """See :class:`.snapshots.Snapshots`."""
        return await self._snapshots.create(instance_id, name, kind=kind)

    async def list_snapshots(self, instance_id: str) -> tuple[Snapshot, ...]:
        """All, oldest first."""
        return await self._snapshots.listed(instance_id)

    async def restore_snapshot(self, instance_id: str, name: str) -> Observation:
        """Go back to it."""
        return await self._snapshots.restore(instance_id, name)

    async def delete_snapshot(self, instance_id: str, name: str) -> bool:
        """Forget it."""
        return await self._snapshots.delete(instance_id, name)

    # Look.

    async def get(self, instance_id: str) -> Observation:
        """As libvirt has it now."""
        await self._version()
        return self._tracker.observe(await self._tracker.find(instance_id))

    async def list(self) -> tuple[Observation, ...]:
        """Every domain with our metadata."""
        await self._version()
        return await self._tracker.list()

    async def stats_source(self, instance_id: str) -> StatsSource:
        """libvirt's statistics of all domains at once; see :mod:`.stats`."""
        await self._tracker.running(instance_id)
        return self._stats

    async def attach(self, instance_id: str) -> Console:
        """Its serial line; one that ended by itself can be attached to while there is output nobody has read."""
        found = await self._tracker.find(instance_id)
        if found.state.phase is Phase.OFF and not self._fifos.unread_bytes(instance_id):
            raise self._tracker.not_running(instance_id)
        live = self._tracker.live_of(instance_id)
        if live.console is not None:
            raise FailedPrecondition(
                f"the console of {instance_id} is attached already: close that attachment first",
                reason="CONSOLE_ATTACHED",
                metadata={"instance_id": instance_id},
            )
        try:
            reader, writer = self._fifos.open(instance_id)
        except FileNotFoundError as exc:
            raise FailedPrecondition(
                f"the console FIFOs of {instance_id} are gone: restart the instance",
                reason="CONSOLE_LOST",
                metadata={"instance_id": instance_id},
            ) from exc

        def closed() -> None:
            live.console = None

        live.console = FifoConsole(instance_id, reader=reader, writer=writer, resize=None, on_close=closed)
        return live.console

    async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
        """Adopt it: its metadata and state say everything, the handle only that there was something."""
        await self._version()
        async with self._tracker.locks.hold(instance_id):
            return await self._tracker.adopt(instance_id)

    def events(self) -> AsyncIterator[Observation]:
        """What happens by itself; see :mod:`.events`."""
        return self._feed

    async def info(self) -> DriverInfo:
        """Whether libvirt answers, and how guests are run; ``reason`` says why so when it does."""
        try:
            version = await self._tracker.probe()
            accelerator = await self._accelerate()
        except HypervisorError as exc:
            available, reason, version = False, exc.message, self._tracker.versions
        else:
            available, reason = True, accelerator.reason
            version = f"{version} ({accelerator.title})"
        return DriverInfo(
            name=DRIVER_NAME,
            types=(InstanceType.VM,),
            available=available,
            reason=reason,
            version=version,
            capabilities=tuple(
                Capability(verb=verb, supported=verb not in _LACKS, reason=_LACKS.get(verb, ""))
                for verb in VERBS
            ),
        )

    async def aclose(self) -> None:
        """End events, consoles and the connection."""
        await self._feed.aclose()
        for live in tuple(self._tracker.live.values()):
            if live.console is not None:
                await live.console.close()
        self._tracker.live.clear()
        self._fifos.close()
        await self._connection.aclose()

    async def _version(self) -> None:
        if not self._tracker.versions:
            await self._tracker.probe()

    async def _accelerate(self) -> Accelerator:
        """How guests are run here; found out once."""
        async with self._probing:
            if self._accelerator is None:
                if (await self._machines.hypervisor_type()).lower() == "test":
                    self._accelerator = Accelerator("test", "libvirt's test driver runs no guests")
                else:
                    capabilities = ElementTree.fromstring(await self._machines.emulator())
                    self._accelerator = await probe_kvm(
                        Path(capabilities.findtext("path", "/usr/bin/qemu-system-x86_64")),
                        cache=self._config.data_dir / "accelerator.json",
                        timeout_s=self._config.probe_timeout_s,
                    )
            return self._accelerator


def _remove(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
        return True
    return False
