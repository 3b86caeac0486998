"""Starting and ending runs: the process of a VMM with its console, control group and taps. Knows no records."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

import structlog

from hypervisor.agent.drivers.fifo_console import ConsoleFifos
from hypervisor.agent.drivers.microvm.config import MicrovmConfig
from hypervisor.agent.drivers.microvm.control_groups import ControlGroups
from hypervisor.agent.drivers.microvm.files import make_file
from hypervisor.agent.drivers.microvm.processes import VmmProcess, end_now, processes_in, spawn
from hypervisor.agent.drivers.microvm.taps import make_tap, remove_tap
from hypervisor.agent.drivers.microvm.vmm import LOG, Launch, Machine, Run, SavedState, Vmm
from hypervisor.core.errors import DeadlineExceeded, FailedPrecondition, HypervisorError

__all__ = ["Runner"]

_FORCED_END_S = 30.0
_ENDING_S = 0.5
"""How long a VMM that refuses to boot may take to end by itself, so that its exit code tells more."""

_log = structlog.get_logger(__name__)


class Runner:
    """Makes runs and takes them away; what fails half way leaves nothing."""

    def __init__(self, config: MicrovmConfig) -> None:
        self._config = config
        self.fifos = ConsoleFifos(config.run_dir, buffer_bytes=config.console_buffer_bytes)
        self.groups = ControlGroups(config.cgroup_root, config.cgroup)
        self._starts = asyncio.Semaphore(config.starts_at_once)

    async def start(
        self,
        vmm: Vmm,
        machine: Machine,
        *,
        cpu_millis: int,
        bridges: tuple[str, ...] = (),
        state: SavedState | None = None,
        spawned: Callable[[Run], None] = lambda run: None,
        kill_strays: bool = False,
    ) -> VmmProcess:
        """A run whose guest runs. ``bridges``: of each card. ``spawned`` is told of the process as soon as there is
        one. ``kill_strays``: an earlier start was cut off, and may have left a process. Waits while many others start.

        Raises what the VMM says, ``FailedPrecondition`` (``START_FAILED``) when its process ends, DeadlineExceeded
        (``VMM_TIMEOUT``) when its guest does not run in time.
        """
        async with self._starts:
            if kill_strays:
                await self.kill_strays(machine)
            return await self._start(vmm, machine, cpu_millis, bridges, state, spawned)

    async def _start(
        self,
        vmm: Vmm,
        machine: Machine,
        cpu_millis: int,
        bridges: tuple[str, ...],
        state: SavedState | None,
        spawned: Callable[[Run], None],
    ) -> VmmProcess:
        process: VmmProcess | None = None
        launch: Launch | None = None
        try:
            await asyncio.to_thread(self._make_ready, machine, vmm, cpu_millis, bridges)
            launch = await vmm.launch(machine)
            process = await self._spawn(vmm, machine, launch)
            spawned(process.run)
            await self._boot(vmm, machine, process, launch, state)
        except BaseException as exc:
            if process is not None:
                await asyncio.shield(self.kill(process))
            with contextlib.suppress(OSError):
                await self.tidy(machine)
            self.fifos.release(machine.instance_id)
            if isinstance(exc, OSError):
                raise _not_started(machine, f"{exc.strerror or exc} ({exc.filename or 'no file'})") from exc
            raise
        finally:
            if launch is not None:
                for fd in (*launch.keep, *launch.close):
                    os.close(fd)
        return process

    async def kill(self, process: VmmProcess) -> None:
        """SIGKILL; returns when it is gone. DeadlineExceeded (``VMM_TIMEOUT``)."""
        process.signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(_FORCED_END_S):
                await process.wait()
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"process {process.run.pid} did not end within {_FORCED_END_S:g} s of SIGKILL: it waits in the kernel",
                reason="VMM_TIMEOUT",
                metadata={"pid": str(process.run.pid)},
            ) from exc

    async def tidy(self, machine: Machine) -> None:
        """Take away the control group and the taps of a run that has ended. Raises OSError."""

        def take_away() -> None:
            self.groups.remove(machine.instance_id)
            for card in machine.cards:
                remove_tap(card.tap)

        await asyncio.to_thread(take_away)

    async def kill_strays(self, machine: Machine) -> None:
        """End what a start that was cut off may have left. ``FailedPrecondition`` when something does not end."""
        await asyncio.to_thread(self._end_strays, machine)

    def _end_strays(self, machine: Machine) -> None:
        uids = range(machine.uid, machine.uid + 1) if machine.uid else range(0)
        pids = {run.pid for run in processes_in((machine.directory,), uids=uids, word=machine.instance_id)}
        for pid in pids.union(self.groups.pids(machine.instance_id)):
            _log.warning("microvm_stray_killed", instance_id=machine.instance_id, pid=pid)
            if not end_now(pid, timeout_s=_FORCED_END_S):
                raise _not_started(machine, f"process {pid} of an earlier start does not end")

    def _make_ready(self, machine: Machine, vmm: Vmm, cpu_millis: int, bridges: tuple[str, ...]) -> None:
        self._limit(machine, vmm, cpu_millis)
        for card, bridge in zip(machine.cards, bridges, strict=True):
            make_tap(card.tap, bridge=bridge, uid=machine.uid)

    def _limit(self, machine: Machine, vmm: Vmm, cpu_millis: int) -> None:
        try:
            self.groups.make(
                machine.instance_id,
                cpu_millis=cpu_millis,
                memory_bytes=(machine.memory_mib + vmm.overhead_mib) << 20,
            )
        except OSError as exc:
            raise FailedPrecondition(
                f"instance {machine.instance_id} gets no control group ({exc.strerror} at {exc.filename}): the agent "
                "needs the right to make some, and the node the controllers cpu and memory",
                reason="LIMIT_REFUSED",
                metadata={"instance_id": machine.instance_id},
            ) from exc

    async def _spawn(self, vmm: Vmm, machine: Machine, launch: Launch) -> VmmProcess:
        root = vmm.root(machine.directory)
        stdin, stdout = self.fifos.make(machine.instance_id)
        with contextlib.ExitStack() as stack:
            # Open for both: the VMM then never sees an end of input, nor a reader that is gone.
            fds = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in (stdin, stdout)]
            fds.append(make_file(root / LOG, uid=machine.uid))
            for fd in fds:
                stack.callback(os.close, fd)
            # By another description than the VMM's own: what the jailer or the loader says goes to the end.
            errors = os.open(root / LOG, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, errors)
            return await spawn(launch, root=root, stdin=fds[0], stdout=fds[1], stderr=errors)

    async def _boot(
        self, vmm: Vmm, machine: Machine, process: VmmProcess, launch: Launch, state: SavedState | None
    ) -> None:
        async def place_and_boot() -> None:
            # Moving a process waits for all processors of the node.
            moving = asyncio.to_thread(self.groups.add, machine.instance_id, process.run.pid)
            if launch.listens is None:
                await moving
            else:
                await asyncio.gather(moving, launch.listens())
            await vmm.boot(machine, process.run, state)

        booting = asyncio.ensure_future(place_and_boot())
        ending = asyncio.ensure_future(process.wait())
        try:
            done, _ = await asyncio.wait(
                {booting, ending}, timeout=self._config.boot_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise DeadlineExceeded(
                    f"the guest of {machine.instance_id} did not run within {self._config.boot_timeout_s:g} s: "
                    "the node is overloaded, or its VMM hangs",
                    reason="VMM_TIMEOUT",
                    metadata={"instance_id": machine.instance_id},
                )
            if ending in done and booting not in done:
                # Its answer may be on the way still: a guest can end as soon as it runs.
                await asyncio.wait({booting}, timeout=_ENDING_S)
            if booting.done():
                error = booting.exception()
                if error is None:
                    return
                # It may have ended, and then its end tells more.
                gone = error.reason == "VMM_UNREACHABLE" if isinstance(error, HypervisorError) else False
                if not gone and not isinstance(error, OSError):
                    raise error
                await asyncio.wait({ending}, timeout=_ENDING_S)
                if not process.ended:
                    raise error
            end = vmm.end_of(machine, process.exit_code)
            raise _not_started(machine, end.message or f"exit code {end.exit_code}")
        finally:
            for task in (booting, ending):
                task.cancel()
            await asyncio.gather(booting, ending, return_exceptions=True)


def _not_started(machine: Machine, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"instance {machine.instance_id} could not be started: {why}",
        reason="START_FAILED",
        metadata={"instance_id": machine.instance_id, "cause": why},
    )
