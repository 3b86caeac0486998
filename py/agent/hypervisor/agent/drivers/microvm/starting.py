"""Starts of microVMs: from the beginning, from a snapshot, and from the memory of a suspend.

A suspended microVM keeps its memory until its guest runs and the record says so, wherever the agent dies. Its steps,
with the record that stands for each:

``suspended``, ``starting``   The memory is being loaded; the guest stays paused, and its disk as it was.
``going_on``, ``starting``    The guest is being let go on. Once it has, its old memory must not meet its newer disk.
neither                       It runs; what was saved of its memory goes.

What an agent finds that starts in between is settled by :meth:`.tracking.Tracker.load`.
"""

import structlog
from msgspec.structs import replace

from hypervisor.agent.drivers.microvm.processes import VmmProcess
from hypervisor.agent.drivers.microvm.runner import Runner
from hypervisor.agent.drivers.microvm.tracking import SUSPENDED, Live, Tracker
from hypervisor.agent.drivers.microvm.vmm import Run, SavedState, VmmPhase
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import Observation

__all__ = ["Starter"]

_log = structlog.get_logger(__name__)


class Starter:
    """See the module's docstring. All is called with the instance's lock held, and is not to be interrupted."""

    def __init__(self, tracker: Tracker, runner: Runner, *, clock: Clock) -> None:
        self._tracker = tracker
        self._runner = runner
        self._clock = clock

    async def start(self, live: Live, state: SavedState | None = None, *, based_on: str = "") -> Observation:
        """From the beginning or from a snapshot's state. Raises what :meth:`.runner.Runner.start` raises."""
        process = await self._run(live, state)
        return self._started(live, process, paused=state is not None and state.paused, based_on=based_on)

    async def go_on(self, live: Live) -> Observation:
        """From the memory of a suspend. As above; what fails before the guest runs leaves it suspended."""
        before = live.record
        vmm, machine = self._tracker.vmm(before), self._tracker.machine(before)
        directory = machine.directory / SUSPENDED
        process = await self._run(live, SavedState(directory=directory, paused=True))
        try:
            self._tracker.save(live, replace(live.record, suspended=False, going_on=True))
            await vmm.resume(machine)
        except HypervisorError as exc:
            if not await self._runs_all_the_same(live, process, exc):
                raise
        observation = self._started(live, process, paused=False, based_on="")
        await self._tracker.forget_memory(live)
        return observation

    async def _runs_all_the_same(self, live: Live, process: VmmProcess, why: HypervisorError) -> bool:
        """Whether a guest runs whose VMM did not say so when it was told to; otherwise its process is ended."""
        record = live.record
        machine = self._tracker.machine(record)
        phase: VmmPhase | None = VmmPhase.PAUSED
        if record.going_on:
            try:
                phase = await self._tracker.vmm(record).phase(machine)
            except HypervisorError:
                phase = None
        if phase is VmmPhase.RUNNING:
            return True
        await self._runner.kill(process)
        if phase is None:
            # It may have run, and written to its disk.
            _log.error("microvm_memory_lost", instance_id=record.instance_id, error=why.message)
            await self._tracker.settle(live, process)
            await self._tracker.forget_memory(live)
        else:
            await self._tracker.undo_going_on(live)
        return False

    async def _run(self, live: Live, state: SavedState | None) -> VmmProcess:
        record = live.record
        was_starting = record.starting

        def spawned(run: Run) -> None:
            self._tracker.save(live, replace(live.record, run=run))

        self._tracker.save(live, replace(record, starting=True, stop_asked=False))
        try:
            return await self._runner.start(
                self._tracker.vmm(record),
                self._tracker.machine(record),
                cpu_millis=record.spec.cpu_millis,
                bridges=tuple(network.bridge for network in record.spec.networks),
                state=state,
                spawned=spawned,
                kill_strays=was_starting,
            )
        except BaseException:
            self._tracker.save(live, replace(record, starting=False))
            raise

    def _started(self, live: Live, process: VmmProcess, *, paused: bool, based_on: str) -> Observation:
        self._tracker.save(
            live,
            replace(
                live.record,
                starting=False,
                going_on=False,
                started_at=self._clock.now(),
                paused=paused,
                end=None,
                based_on=based_on,
            ),
        )
        self._tracker.watch(live, process)
        return self._tracker.observe(live)
