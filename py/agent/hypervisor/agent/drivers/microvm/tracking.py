"""Every instance this driver knows: found again by its record, watched, observed, settled after a run."""

import asyncio
import contextlib
from dataclasses import dataclass

import structlog
from msgspec.structs import replace

from hypervisor.agent.drivers.fifo_console import FifoConsole
from hypervisor.agent.drivers.keyed_locks import KeyedLocks
from hypervisor.agent.drivers.microvm.choosing import Chooser
from hypervisor.agent.drivers.microvm.config import MicrovmConfig
from hypervisor.agent.drivers.microvm.files import disk_error, remove_tree, trim
from hypervisor.agent.drivers.microvm.observing import end_of_run, machine_of, observe
from hypervisor.agent.drivers.microvm.processes import VmmProcess, boot_id
from hypervisor.agent.drivers.microvm.records import Record, RecordStore
from hypervisor.agent.drivers.microvm.runner import Runner
from hypervisor.agent.drivers.microvm.vmm import LOG, End, Machine, Vmm, VmmPhase
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound, ResourceExhausted
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

__all__ = ["MOST_LOG_BYTES", "SUSPENDED", "Live", "Tracker"]

SUSPENDED = "suspended"
"""Directory of an instance's that holds the state it goes on from."""
MOST_LOG_BYTES = 4 << 20
"""A guest can make its VMM complain as often as it likes; past this, what was said is forgotten."""
_TRIM_EVERY_S = 60.0

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Live:
    """An instance; all but the record can be found again without it."""

    record: Record
    process: VmmProcess | None = None
    console: FifoConsole | None = None

    @property
    def running(self) -> bool:
        """Whether it has a process."""
        return self.process is not None and not self.process.ended


class Tracker:
    """The instances below one data directory. ``locks`` is held by whoever changes an instance."""

    def __init__(
        self, config: MicrovmConfig, store: RecordStore, chooser: Chooser, runner: Runner, *, clock: Clock
    ) -> None:
        self._config = config
        self._store = store
        self._chooser = chooser
        self._runner = runner
        self._clock = clock
        self._settling: set[asyncio.Task[None]] = set()
        self._loaded: asyncio.Task[None] | None = None
        self._trimming: asyncio.Task[None] | None = None
        self._claimed: set[int] = set()
        self.locks = KeyedLocks()
        self.live: dict[str, Live] = {}
        self.events: asyncio.Queue[Observation] = asyncio.Queue()

    # Find.

    async def load(self) -> None:
        """Find what earlier agents have left, once."""
        if self._loaded is None or (self._loaded.done() and self._loaded.exception() is not None):
            self._loaded = asyncio.ensure_future(self._load())
        await asyncio.shield(self._loaded)
        if self._trimming is None:
            self._trimming = asyncio.ensure_future(self._trim_for_ever())

    async def _load(self) -> None:
        try:
            records = await asyncio.to_thread(lambda: tuple(self._store.load()))
        except OSError as exc:
            raise disk_error(exc, "what is known of microVMs", self._store.root) from exc
        for record in records:
            if record.instance_id in self.live:
                continue
            live = Live(record)
            if record.run is not None:
                live.process = VmmProcess.adopt(record.run)
            self.live[record.instance_id] = live
            if record.starting:
                await self._settle_half_start(live)
            elif record.suspended and record.run is not None:
                await self._finish_suspending(live)
            elif record.run is not None:
                await self._take_up(live)

    async def _take_up(self, live: Live) -> None:
        self._runner.fifos.adopt(live.record.instance_id)
        if live.process is None or live.process.ended:
            await self.settle(live, live.process)
        else:
            self.watch(live, live.process)

    async def _settle_half_start(self, live: Live) -> None:
        """An agent died between making a process and letting its guest run, or telling of it: nobody was told that it
        runs, so it does not, but where it went on from saved memory and that would be lost. What the record does not
        know of is ended by the next start, or goes with the delete."""
        record, machine = live.record, self.machine(live.record)
        if record.going_on and live.running:
            try:
                phase = await self.vmm(record).phase(machine)
            except HypervisorError as exc:
                _log.warning("microvm_phase_unknown", instance_id=record.instance_id, error=str(exc))
                await self._end(live)
            else:
                if phase is not VmmPhase.RUNNING:
                    await self._end(live)
                    await self.undo_going_on(live)
                    return
        elif not record.going_on:
            await self._end(live)
            await self._tidy(machine)
            self.save(live, replace(record, run=None))
            return
        # It runs, or did: the disk may be newer than the saved memory.
        self.save(
            live, replace(record, starting=False, going_on=False, started_at=self._clock.now(), paused=False)
        )
        await self._take_up(live)
        await self.forget_memory(live)

    async def undo_going_on(self, live: Live) -> None:
        """Suspended as before: its process has ended, and its guest never ran; called with the instance's lock held."""
        live.process = None
        await self._tidy(self.machine(live.record))
        self.save(live, replace(live.record, run=None, starting=False, going_on=False, suspended=True))

    async def forget_memory(self, live: Live) -> None:
        """Drop what a suspend has saved, once the guest has gone on from it."""
        try:
            await asyncio.to_thread(remove_tree, self.machine(live.record).directory / SUSPENDED)
        except OSError as exc:
            # Nothing goes on from it any more; the next suspend or the delete takes it away.
            _log.warning("microvm_memory_left", instance_id=live.record.instance_id, error=str(exc))

    async def _finish_suspending(self, live: Live) -> None:
        """An agent died after it had recorded that the memory is on disk, with the guest paused."""
        process = live.process
        if process is not None:
            await self._runner.kill(process)
        await self.settle(live, process, suspended=True)

    async def _end(self, live: Live) -> None:
        if live.process is not None:
            await self._runner.kill(live.process)
            live.process = None

    async def known(self, instance_id: str) -> Live:
        """``NotFound`` (``INSTANCE_NOT_FOUND``)."""
        await self.load()
        live = self.live.get(instance_id)
        if live is None:
            raise NotFound(
                f"there is no microVM {instance_id} below {self._store.root}",
                reason="INSTANCE_NOT_FOUND",
                metadata={"instance_id": instance_id},
            )
        return live

    def vmm(self, record: Record) -> Vmm:
        """The VMM that runs it."""
        return self._chooser.by_key(record.vmm)

    def machine(self, record: Record) -> Machine:
        """What its VMM is told."""
        return machine_of(record, self._config)

    @staticmethod
    def not_running(instance_id: str) -> FailedPrecondition:
        """The error for what needs a running instance."""
        return FailedPrecondition(
            f"instance {instance_id} does not run: start it first",
            reason="NOT_RUNNING",
            metadata={"instance_id": instance_id, "status": InstanceStatus.STOPPED},
        )

    def observe(self, live: Live) -> Observation:
        """What the platform is told of it now."""
        return observe(live.record, running=live.running, now=self._clock.now())

    def free_uid(self) -> int:
        """A user that no instance has; give it back by ``release_uid`` once its record is there or it is not made."""
        taken = {live.record.uid for live in self.live.values()} | self._claimed
        # The last one is the probe's.
        for uid in range(self._config.first_uid, self._config.first_uid + self._config.uids - 1):
            if uid not in taken:
                self._claimed.add(uid)
                return uid
        raise ResourceExhausted(
            f"all {self._config.uids} users from microvm.first_uid {self._config.first_uid} on are taken",
            reason="NODE_FULL",
        )

    def release_uid(self, uid: int) -> None:
        """See ``free_uid``."""
        self._claimed.discard(uid)

    # Change.

    def save(self, live: Live, record: Record) -> None:
        """Keep a new record; FailedPrecondition or ResourceExhausted when the disk does not take it."""
        try:
            self._store.save(record)
        except OSError as exc:
            raise disk_error(exc, "the record of the instance", self._store.root) from exc
        live.record = record

    def watch(self, live: Live, process: VmmProcess) -> None:
        """Settle the run when its process ends by itself."""

        def ended() -> None:
            task = asyncio.ensure_future(self._settle_ended(live, process))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

        live.process = process
        process.on_end(ended)

    async def _settle_ended(self, live: Live, process: VmmProcess) -> None:
        async with self.locks.hold(live.record.instance_id):
            # A stop, a delete or another start has settled it meanwhile.
            if live.process is process:
                await self.settle_ended(live)

    async def settle_ended(self, live: Live) -> None:
        """Settle a run that has ended by itself, if it has, and tell of it; called with the instance's lock held."""
        instance_id = live.record.instance_id
        if live.process is None or not live.process.ended or self.live.get(instance_id) is not live:
            return
        try:
            observation = await self.settle(live, live.process)
        except HypervisorError as exc:
            _log.warning("microvm_end_not_recorded", instance_id=instance_id, error=str(exc))
            observation = self.observe(live)
        self.events.put_nowait(observation)

    async def settle(
        self, live: Live, process: VmmProcess | None, *, forced: bool = False, suspended: bool = False
    ) -> Observation:
        """Record how a run ended, and take away what it used; called with the instance's lock held."""
        record = live.record
        machine = self.machine(record)
        exit_code = None if process is None else process.exit_code
        try:
            end = self.vmm(record).end_of(machine, exit_code)
        except HypervisorError as exc:
            end = End(True, exit_code, exc.message)
        ended = end_of_run(
            end,
            requested=record.stop_asked,
            forced=forced,
            suspended=suspended,
            oom_kills=self._runner.groups.oom_kills(record.instance_id),
            now=self._clock.now(),
            earlier_boot=record.run is not None and record.run.boot_id != boot_id(),
        )
        await self._tidy(machine)
        # From here on without a pause: nobody sees it ended and its end not recorded.
        live.process = None
        new = replace(
            record,
            run=None,
            starting=False,
            going_on=False,
            paused=False,
            end=ended,
            based_on="",
        )
        live.record = new
        self.save(live, new)
        return self.observe(live)

    async def _tidy(self, machine: Machine) -> None:
        try:
            await self._runner.tidy(machine)
        except OSError as exc:
            # The next start or the delete takes it away.
            _log.warning("microvm_not_tidied", instance_id=machine.instance_id, error=str(exc))

    async def confirm(self, live: Live) -> None:
        """After the agent's restart: whether it is paused is for its VMM to say, should the agent have died between
        the doing and the recording. Called with the instance's lock held."""
        if not live.running:
            return
        try:
            phase = await self.vmm(live.record).phase(self.machine(live.record))
        except HypervisorError as exc:
            _log.warning("microvm_phase_unknown", instance_id=live.record.instance_id, error=str(exc))
            return
        paused = phase is VmmPhase.PAUSED
        if phase is not VmmPhase.STARTING and paused != live.record.paused:
            self.save(live, replace(live.record, paused=paused))

    async def remove(self, instance_id: str) -> bool:
        """End it and remove everything; called with its lock held. Finishes what an earlier removal has left."""
        live = self.live.get(instance_id)
        directory = self._store.directory(instance_id)
        existed = live is not None or directory.exists()
        if live is not None:
            if live.process is not None:
                await self._runner.kill(live.process)
                live.process = None
            if live.record.starting:
                await self._runner.kill_strays(self.machine(live.record))
            if live.console is not None:
                await live.console.close()
            machine = self.machine(live.record)
            await self._runner.tidy(machine)
            with contextlib.suppress(HypervisorError):
                self.vmm(live.record).remove(machine)
        elif existed:
            await asyncio.to_thread(self._runner.groups.remove, instance_id)
        existed |= self._runner.fifos.remove(instance_id)
        # The record is in it: what cannot be removed at once is found by its directory the next time.
        existed |= await asyncio.to_thread(remove_tree, directory)
        self.live.pop(instance_id, None)
        if not self.live:
            await asyncio.to_thread(self._runner.groups.remove_parent)
        return existed

    async def trim_logs(self, *, most_bytes: int) -> None:
        """Cut logs of running VMMs that take more of the disk."""
        logs = {
            instance_id: self.vmm(live.record).root(self._store.directory(instance_id)) / LOG
            for instance_id, live in self.live.items()
            if live.running
        }
        for instance_id, log in logs.items():
            freed = await asyncio.to_thread(trim, log, most_bytes)
            if freed:
                _log.warning("microvm_log_cut", instance_id=instance_id, bytes=freed)

    async def _trim_for_ever(self) -> None:
        while True:
            await self._clock.sleep(_TRIM_EVERY_S)
            await self.trim_logs(most_bytes=MOST_LOG_BYTES)

    async def aclose(self) -> None:
        """Let go of all processes and consoles; instances run on."""
        if self._trimming is not None:
            self._trimming.cancel()
            await asyncio.gather(self._trimming, return_exceptions=True)
            self._trimming = None
        if self._loaded is not None:
            await asyncio.gather(self._loaded, return_exceptions=True)
        for task in tuple(self._settling):
            task.cancel()
        await asyncio.gather(*self._settling, return_exceptions=True)
        for live in self.live.values():
            if live.process is not None:
                live.process.close()
            if live.console is not None:
                await live.console.close()
        self.live.clear()
        self._loaded = None
        self._runner.fifos.close()
