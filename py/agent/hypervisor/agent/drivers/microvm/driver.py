"""The microVM driver: the ``Driver`` contract and all of its powers over VMMs, runs, records and snapshots."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import structlog
from msgspec.structs import replace

from hypervisor.agent.drivers.driver import ASK_AGAIN_S, VERBS, Assignment, Console, Handle
from hypervisor.agent.drivers.fifo_console import FifoConsole
from hypervisor.agent.drivers.microvm.choosing import Choice, Chooser
from hypervisor.agent.drivers.microvm.config import MicrovmConfig
from hypervisor.agent.drivers.microvm.creating import can_name, check_assignment, open_sources, write_files
from hypervisor.agent.drivers.microvm.files import disk_error, remove_tree
from hypervisor.agent.drivers.microvm.processes import VmmProcess
from hypervisor.agent.drivers.microvm.records import Record, RecordStore
from hypervisor.agent.drivers.microvm.resizing import check_sizes, resize
from hypervisor.agent.drivers.microvm.runner import Runner
from hypervisor.agent.drivers.microvm.snapshots import Snapshots
from hypervisor.agent.drivers.microvm.tracking import MOST_LOG_BYTES, SUSPENDED, Live, Tracker
from hypervisor.agent.drivers.microvm.vmm import Machine, Run, SavedState, Vmm
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.clock import Clock
from hypervisor.core.errors import AlreadyExists, FailedPrecondition, HypervisorError, Unimplemented
from hypervisor.core.ids import IdSource
from hypervisor.core.machines import MicrovmOptions, Snapshot, SnapshotKind
from hypervisor.core.model import Capability, DriverInfo, InstanceSpec, Observation, Sizes
from hypervisor.core.states import InstanceType
from hypervisor.ext.stats_sampler import Sources

__all__ = ["MicrovmDriver"]

_NAME = "microvm"
_LACKS = {"resize": "the console of a microVM is a serial line, which has no size"}
_NET = Path("/sys/class/net")

_log = structlog.get_logger(__name__)


class MicrovmDriver:
    """See hypervisor.agent.drivers.driver and .powers. ``vmms``: in the order in which they are preferred."""

    def __init__(self, config: MicrovmConfig, vmms: Sequence[Vmm], *, clock: Clock, new_id: IdSource) -> None:
        self._config = config
        self._clock = clock
        self._store = RecordStore(config.data_dir)
        self._runner = Runner(config)
        self._chooser = Chooser(vmms, config, self._runner, new_id=new_id)
        self._tracker = Tracker(config, self._store, self._chooser, self._runner, clock=clock)
        self._snapshots = Snapshots(self._tracker, clock=clock)

    @property
    def name(self) -> str:
        """``microvm``."""
        return _NAME

    # Create and delete.

    async def create(self, assignment: Assignment) -> Handle:
        """Check it, choose its VMM, copy its files."""
        check_assignment(assignment, self._config)
        await self._tracker.load()
        instance_id = assignment.instance_id
        async with self._tracker.locks.hold(instance_id):
            live = self._tracker.live.get(instance_id)
            if live is not None:
                self._take_over(live, assignment)
            else:
                live = await self._make(assignment)
        return {"instance": instance_id, "vmm": live.record.vmm}

    def _take_over(self, live: Live, assignment: Assignment) -> None:
        """A create that is repeated: what does not need other files holds from the next start on."""
        old, new = live.record.spec, assignment.spec
        if _files_of(old) != _files_of(new):
            raise AlreadyExists(
                f"instance {assignment.instance_id} is on this node with other files: delete it first",
                reason="INSTANCE_EXISTS",
                metadata={"instance_id": assignment.instance_id},
            )
        record = replace(
            live.record,
            name=assignment.name,
            project=assignment.project,
            generation=assignment.generation,
            epoch=assignment.epoch,
            spec=new,
        )
        check_sizes(self._tracker, live, record)
        self._tracker.vmm(record).check(self._tracker.machine(record))
        self._tracker.save(live, record)

    async def _make(self, assignment: Assignment) -> Live:
        instance_id, spec = assignment.instance_id, assignment.spec
        options = spec.microvm or MicrovmOptions()
        choice = await self._chooser.choose(options.vmm)
        sources = await open_sources(assignment, self._config)
        uid = self._tracker.free_uid() if self._config.jail and os.geteuid() == 0 else 0
        record = _record(
            assignment, choice, uid=uid, initrd=sources.initrd is not None, disk=sources.disk_bytes > 0
        )
        live = Live(record)
        directory = self._store.directory(instance_id)
        try:
            machine = self._tracker.machine(record)
            await asyncio.to_thread(_new_directory, directory)
            await write_files(sources, choice.vmm.root(directory), uid=uid)
            choice.vmm.check(machine)
            self._tracker.save(live, record)
        except BaseException as exc:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(remove_tree, directory)
            if isinstance(exc, OSError):
                raise disk_error(exc, f"instance {instance_id}", directory) from exc
            raise
        finally:
            sources.close()
            self._tracker.release_uid(uid)
        self._tracker.live[instance_id] = live
        return live

    async def delete(self, instance_id: str) -> bool:
        """End and remove it, its snapshots and all."""
        await self._tracker.load()
        if not can_name(instance_id):
            return False
        async with self._tracker.locks.hold(instance_id):
            try:
                return await uninterrupted(self._tracker.remove(instance_id))
            except OSError as exc:
                raise disk_error(exc, "the removal of the instance", self._store.root) from exc

    # Start and stop.

    async def start(self, instance_id: str) -> Observation:
        """From the beginning, or from where it was suspended."""
        live = await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            if live.running:
                return self._tracker.observe(live)
            await self._tracker.settle_ended(live)
            if not live.record.suspended:
                return await uninterrupted(self._start(live))
            directory = self._tracker.machine(live.record).directory / SUSPENDED
            # Once: should the agent die after the guest has gone on, its old memory must not meet its newer disk.
            self._tracker.save(live, replace(live.record, suspended=False))
            try:
                observation = await uninterrupted(self._start(live, SavedState(directory=directory)))
            except HypervisorError:
                self._tracker.save(live, replace(live.record, suspended=True))
                raise
            await asyncio.to_thread(remove_tree, directory)
            return observation

    async def _start(self, live: Live, state: SavedState | None = None, *, based_on: str = "") -> Observation:
        record = live.record
        was_starting = record.starting
        before = record

        def spawned(run: Run) -> None:
            self._tracker.save(live, replace(live.record, run=run))

        self._tracker.save(live, replace(record, starting=True, stop_asked=False))
        try:
            process = await self._runner.start(
                self._tracker.vmm(record),
                self._tracker.machine(record),
                cpu_millis=record.spec.cpu_millis,
                bridges=tuple(network.bridge for network in record.spec.networks),
                state=state,
                spawned=spawned,
                kill_strays=was_starting,
            )
        except BaseException:
            self._tracker.save(live, replace(before, starting=False))
            raise
        self._tracker.save(
            live,
            replace(
                live.record,
                starting=False,
                started_at=self._clock.now(),
                paused=state is not None and state.paused,
                end=None,
                based_on=based_on,
            ),
        )
        self._tracker.watch(live, process)
        return self._tracker.observe(live)

    async def stop(self, instance_id: str, *, grace_s: float) -> Observation:
        """Ask its guest, then SIGKILL."""
        await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            return await self._stop(live, grace_s=grace_s)

    async def _stop(self, live: Live, *, grace_s: float) -> Observation:
        process = live.process
        if process is None:
            return self._tracker.observe(live)
        forced = False
        if not process.ended:
            self._tracker.save(live, replace(live.record, stop_asked=True))
            if grace_s > 0 and not live.record.paused:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await self._end_politely(live, process)
            if not process.ended:
                forced = True
                await uninterrupted(self._runner.kill(process))
        observation = await self._tracker.settle(live, process, forced=forced)
        self._runner.fifos.release(live.record.instance_id)
        return observation

    async def _end_politely(self, live: Live, process: VmmProcess) -> None:
        heard = True
        while heard:
            # One that does not answer may be about to end: its socket goes before it does.
            heard = await self._asked(live)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S):
                    await process.wait()
                    return

    async def _asked(self, live: Live) -> bool:
        try:
            return await self._tracker.vmm(live.record).ask_to_stop(self._tracker.machine(live.record))
        except HypervisorError as exc:
            _log.warning("microvm_not_asked_to_stop", instance_id=live.record.instance_id, error=exc.message)
            return False

    async def restart(self, instance_id: str, *, grace_s: float) -> Observation:
        """Stop and start, from the beginning: memory on disk is dropped."""
        await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            await self._stop(live, grace_s=grace_s)
            await self._drop_suspended(live)
            return await uninterrupted(self._start(live))

    # Powers.

    async def update(self, instance_id: str, sizes: Sizes) -> Observation:
        """See ``Updating``."""
        await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            await self._tracker.settle_ended(live)
            try:
                return resize(self._tracker, self._runner, live, sizes)
            except OSError as exc:
                raise disk_error(exc, "what is recorded of the instance", self._store.root) from exc

    async def pause(self, instance_id: str) -> Observation:
        """See ``Pausing``."""
        return await self._change_phase(instance_id, paused=True)

    async def resume(self, instance_id: str) -> Observation:
        """See ``Pausing``."""
        return await self._change_phase(instance_id, paused=False)

    async def _change_phase(self, instance_id: str, *, paused: bool) -> Observation:
        async with self._running(instance_id, "pause") as live:
            vmm, machine = self._tracker.vmm(live.record), self._tracker.machine(live.record)
            if paused:
                await vmm.pause(machine)
            else:
                await vmm.resume(machine)
            if live.record.paused != paused:
                self._tracker.save(live, replace(live.record, paused=paused))
            return self._tracker.observe(live)

    async def suspend(self, instance_id: str) -> Observation:
        """See ``Suspending``."""
        live = await self._tracker.known(instance_id)
        if live.record.suspended:
            return self._tracker.observe(live)
        async with self._running(instance_id, "suspend") as live:
            process = live.process
            assert process is not None
            directory = self._tracker.machine(live.record).directory / SUSPENDED
            await self._snapshots.save_memory(live, directory)
            self._tracker.save(live, replace(live.record, suspended=True, stop_asked=True))
            await uninterrupted(self._runner.kill(process))
            observation = await self._tracker.settle(live, process, suspended=True)
            self._runner.fifos.release(instance_id)
            return observation

    async def _drop_suspended(self, live: Live) -> None:
        if live.record.suspended:
            self._tracker.save(live, replace(live.record, suspended=False))
            await asyncio.to_thread(remove_tree, self._tracker.machine(live.record).directory / SUSPENDED)

    async def create_snapshot(self, instance_id: str, name: str, *, kind: SnapshotKind) -> Snapshot:
        """See ``Snapshotting``."""
        await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            self._require(live, "snapshot-diff" if kind is SnapshotKind.DIFF else "snapshot")
            if live.record.suspended:
                raise FailedPrecondition(
                    f"instance {instance_id} is suspended: start it, then take the snapshot",
                    reason="SUSPENDED",
                    metadata={"instance_id": instance_id},
                )
            return await uninterrupted(self._snapshots.take(live, name, kind=kind))

    async def list_snapshots(self, instance_id: str) -> tuple[Snapshot, ...]:
        """See ``Snapshotting``."""
        return self._snapshots.listed(await self._tracker.known(instance_id))

    async def restore_snapshot(self, instance_id: str, name: str) -> Observation:
        """See ``Snapshotting``."""
        await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            self._require(live, "snapshot")
            kept = self._snapshots.find(live, name)
            await self._stop(live, grace_s=0.0)
            await self._drop_suspended(live)
            await self._snapshots.bring_disk_back(live, name)
            if not kept.snapshot.memory:
                return self._tracker.observe(live)
            state = self._snapshots.state(live, kept)
            return await uninterrupted(self._start(live, state, based_on=name))

    async def delete_snapshot(self, instance_id: str, name: str) -> bool:
        """See ``Snapshotting``."""
        await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            return await self._snapshots.forget(await self._tracker.known(instance_id), name)

    @contextlib.asynccontextmanager
    async def _running(self, instance_id: str, verb: str) -> AsyncIterator[Live]:
        """An instance that runs, locked. ``FailedPrecondition`` (``NOT_RUNNING``)."""
        await self._tracker.known(instance_id)
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            if not live.running:
                raise self._tracker.not_running(instance_id)
            self._require(live, verb)
            yield live

    def _require(self, live: Live, verb: str) -> None:
        reason = self._tracker.vmm(live.record).lacks.get(verb)
        if reason is not None:
            raise Unimplemented(
                f"{live.record.vmm_version}, which runs {live.record.instance_id}, cannot {verb}: {reason}",
                reason="CAPABILITY_MISSING",
                metadata={"instance_id": live.record.instance_id, "verb": verb},
            )

    # Look.

    async def get(self, instance_id: str) -> Observation:
        """As it is now."""
        live = await self._tracker.known(instance_id)
        if live.process is not None and live.process.ended:
            # Its end is about to be told; nobody shall see it in between.
            async with self._tracker.locks.hold(instance_id):
                await self._tracker.settle_ended(live)
        return self._tracker.observe(live)

    async def list(self) -> tuple[Observation, ...]:
        """All that have a record."""
        await self._tracker.load()
        return tuple([await self.get(instance_id) for instance_id in tuple(self._tracker.live)])

    async def stats_source(self, instance_id: str) -> StatsSource:
        """The control group of its VMM, and the tap of its first card."""
        live = await self._tracker.known(instance_id)
        if not live.running:
            raise self._tracker.not_running(instance_id)
        paths = self._runner.groups.paths(instance_id)
        cards = self._tracker.machine(live.record).cards
        return Sources(
            cgroup2=paths.unified or paths.pressure,
            cgroup1=paths.controllers,
            tap=_NET / cards[0].tap / "statistics" if cards else None,
        )

    async def attach(self, instance_id: str) -> Console:
        """Its first serial port."""
        live = await self._tracker.known(instance_id)
        fifos = self._runner.fifos
        if not live.running and not fifos.unread_bytes(instance_id):
            raise self._tracker.not_running(instance_id)
        if live.console is not None:
            raise FailedPrecondition(
                f"the console of {instance_id} is attached already: close that attachment first",
                reason="CONSOLE_ATTACHED",
                metadata={"instance_id": instance_id},
            )
        try:
            reader, writer = fifos.open(instance_id)
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

    async def trim_logs(self, *, most_bytes: int = MOST_LOG_BYTES) -> None:
        """Cut the logs of VMMs that take more of the disk; done every minute by itself."""
        await self._tracker.trim_logs(most_bytes=most_bytes)

    def machine(self, instance_id: str) -> Machine:
        """What the VMM of a known instance is told; KeyError for another."""
        return self._tracker.machine(self._tracker.live[instance_id].record)

    async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
        """Adopt it: its record and its process say everything, the handle only that there was something."""
        await self._tracker.load()
        async with self._tracker.locks.hold(instance_id):
            live = self._tracker.live.get(instance_id)
            if live is None:
                return None
            await self._tracker.confirm(live)
            await self._tracker.settle_ended(live)
            return self._tracker.observe(live)

    async def events(self) -> AsyncIterator[Observation]:
        """Ends of runs that nobody asked for."""
        await self._tracker.load()
        while True:
            yield await self._tracker.events.get()

    async def info(self) -> DriverInfo:
        """Whether a VMM can run here, and which one is taken."""
        versions = await self._chooser.versions()
        decided = self._chooser.decided()
        available = bool(versions)
        if isinstance(decided, HypervisorError):
            available, reason = False, decided.message
        elif decided is None:
            reason = "which VMM runs guests here is being probed"
        else:
            reason = f"{decided.version}: {decided.reason}" if decided.reason else ""
        lacks = dict(_LACKS)
        for verb in VERBS:
            # Of those that run here: what only an absent one could do is not offered.
            offered = self._chooser.usable or self._chooser.vmms
            reasons = [vmm.lacks[verb] for vmm in offered if verb in vmm.lacks]
            if len(reasons) == len(offered):
                lacks.setdefault(verb, reasons[0])
        return DriverInfo(
            name=_NAME,
            types=(InstanceType.MICROVM,),
            available=available,
            reason=reason,
            version=", ".join(versions),
            capabilities=tuple(
                Capability(verb=verb, supported=verb not in lacks, reason=lacks.get(verb, ""))
                for verb in VERBS
            ),
        )

    async def aclose(self) -> None:
        """Let go of everything; instances run on. Idempotent."""
        await self._chooser.aclose()
        await self._tracker.aclose()


def _new_directory(directory: Path) -> None:
    # What a create that was cut off has left goes.
    remove_tree(directory)
    directory.mkdir(mode=0o700, parents=True)


def _files_of(spec: InstanceSpec) -> tuple[object, ...]:
    """What a specification has copied by its create, and what a saved state depends on."""
    return (
        spec.image,
        spec.disk_gb,
        spec.kernel_path,
        spec.initrd_path,
        (spec.microvm or MicrovmOptions()).vmm,
    )


def _record(assignment: Assignment, choice: Choice, *, uid: int, initrd: bool, disk: bool) -> Record:
    return Record(
        instance_id=assignment.instance_id,
        name=assignment.name,
        project=assignment.project,
        generation=assignment.generation,
        epoch=assignment.epoch,
        spec=assignment.spec,
        vmm=choice.vmm.key,
        vmm_version=choice.version,
        vmm_reason=choice.reason,
        uid=uid,
        initrd=initrd,
        disk=disk,
    )
