"""Every instance this driver knows: found again by its labels, observed, settled after a run, adopted after a restart.

The driver's verbs (:mod:`.driver`) are built of these; the event feed calls ``on_exit``, ``on_oom`` and ``resync``.
"""

import asyncio
import signal
from dataclasses import dataclass

import structlog
from containerd_api.services.containers.v1 import containers_pb2
from msgspec.structs import replace

from hypervisor.agent.drivers.containerd.config import ContainerdConfig
from hypervisor.agent.drivers.containerd.events import TaskExit
from hypervisor.agent.drivers.containerd.labels import INSTANCE_ID, Record
from hypervisor.agent.drivers.containerd.observing import TaskPhase, TaskState, end_of_run, observe
from hypervisor.agent.drivers.containerd.runtime import Mounts, Runtime
from hypervisor.agent.drivers.fifo_console import ConsoleFifos, FifoConsole
from hypervisor.agent.drivers.keyed_locks import KeyedLocks
from hypervisor.agent.stats.cgroups import CgroupPaths, cgroup_paths, expected_paths, read_oom_kills
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound, Unavailable
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

__all__ = ["DRIVER_NAME", "Live", "Tracker"]

DRIVER_NAME = "containerd"

_PROBE_TIMEOUT_S = 5.0
_FORCED_END_S = 30.0
"""How long a process may take to end after SIGKILL before the stop is given up."""

_log = structlog.get_logger()


@dataclass(slots=True)
class Live:
    """What this process remembers of an instance; everything can be found again without it."""

    record: Record
    mounts: Mounts | None = None
    never_started: bool = False
    cgroup: CgroupPaths | None = None
    pid: int = 0
    console: FifoConsole | None = None

    def forget_run(self) -> None:
        """Drop what belonged to the run that ended."""
        self.cgroup, self.pid = None, 0


class Tracker:
    """The instances of one containerd namespace. ``locks`` is held by whoever changes an instance."""

    def __init__(
        self, runtime: Runtime, fifos: ConsoleFifos, config: ContainerdConfig, *, clock: Clock
    ) -> None:
        self._runtime = runtime
        self._fifos = fifos
        self._config = config
        self._clock = clock
        self._version = ""
        self.locks = KeyedLocks()
        self.live: dict[str, Live] = {}

    @property
    def version(self) -> str:
        """containerd's version; empty until it answered once."""
        return self._version

    async def probe(self) -> str:
        """Ask containerd for its version; raises when it does not answer."""
        self._version = await self._runtime.version(timeout_s=_PROBE_TIMEOUT_S)
        return self._version

    # Find.

    def cgroup(self, instance_id: str) -> str:
        """The path of its control group, as the runtime specification has it."""
        return f"/{self._config.namespace}/{instance_id}"

    def locate(self, pid: int) -> CgroupPaths | None:
        """The control group of a process; None when it ended a moment ago."""
        try:
            text = (self._config.proc_root / str(pid) / "cgroup").read_text("utf-8")
        except OSError:
            return None
        return cgroup_paths(text, root=self._config.cgroup_root, proc_root=self._config.proc_root)

    async def observe(self, record: Record, state: TaskState | None) -> Observation:
        """What the platform is told of a container with this record and task."""
        version = self._version or await self.probe()
        if state is not None and state.phase is TaskPhase.STOPPED and record.end is None:
            live = self.live.get(record.instance_id)
            kills = 0 if live is None else self.oom_kills(record.instance_id, live)
            end = end_of_run(
                state.exit_code,
                state.exited_at,
                oom_kills=kills,
                requested=record.stop_asked,
                now=self._clock.now(),
            )
            record = replace(record, end=end)
        return observe(record, state, runtime=f"{DRIVER_NAME} {version}", now=self._clock.now())

    async def known(self, instance_id: str) -> Live:
        """What is remembered of it, or found by its labels. ``NotFound`` (``INSTANCE_NOT_FOUND``)."""
        live = self.live.get(instance_id)
        if live is None:
            record = self.record_of(await self.container(instance_id))
            live = self.live.setdefault(instance_id, Live(record))
        return live

    async def container(self, instance_id: str) -> containers_pb2.Container:
        """Its container as containerd has it now. ``NotFound`` (``INSTANCE_NOT_FOUND``)."""
        container = await self._runtime.get_container(instance_id)
        # Another program may keep containers in the namespace too: one without our label is none of ours.
        if container is None or INSTANCE_ID not in container.labels:
            self.live.pop(instance_id, None)
            raise NotFound(
                f"containerd has no instance {instance_id} in namespace {self._config.namespace}",
                reason="INSTANCE_NOT_FOUND",
                metadata={"instance_id": instance_id},
            )
        return container

    def record_of(self, container: containers_pb2.Container) -> Record:
        """The record in its labels. ``FailedPrecondition`` for labels somebody has damaged."""
        try:
            return Record.from_labels(dict(container.labels))
        except ValueError as exc:
            raise FailedPrecondition(
                f"the labels of container {container.id} were changed ({exc}): remove it with ctr",
                reason="CONTAINER_UNREADABLE",
                metadata={"container": container.id},
            ) from exc

    async def running(self, instance_id: str) -> TaskState:
        """Its task, which runs. ``FailedPrecondition`` (``NOT_RUNNING``)."""
        state = await self._runtime.task_state(instance_id)
        if state is None or state.phase not in (TaskPhase.RUNNING, TaskPhase.PAUSED):
            raise self.not_running(instance_id)
        return state

    @staticmethod
    def not_running(instance_id: str) -> FailedPrecondition:
        """The error for what needs a running instance."""
        return FailedPrecondition(
            f"instance {instance_id} does not run: start it first",
            reason="NOT_RUNNING",
            metadata={"instance_id": instance_id, "status": InstanceStatus.STOPPED},
        )

    async def list(self) -> tuple[Observation, ...]:
        """Every container with our labels, as it is now."""
        containers, tasks = await asyncio.gather(self._runtime.list_containers(), self._runtime.list_tasks())
        observations = []
        for container in containers:
            try:
                record = self.record_of(container)
            except FailedPrecondition as exc:
                _log.warning("container_labels_unreadable", container=container.id, error=str(exc))
                continue
            observations.append(await self.observe(record, tasks.get(container.id)))
        return tuple(observations)

    # The end of a run.

    async def remove_task(self, instance_id: str) -> bool:
        """Kill and remove the task, whatever it does; returns whether there was one."""
        state = await self._runtime.task_state(instance_id)
        if state is None:
            return False
        if state.phase is not TaskPhase.STOPPED:
            await self.kill(instance_id, state)
        await self._runtime.delete_task(instance_id)
        return True

    async def kill(self, instance_id: str, state: TaskState) -> None:
        """SIGKILL for all of its processes; returns when they are gone."""
        if await self._runtime.kill_task(instance_id, signal.SIGKILL, all_processes=True):
            if state.phase is TaskPhase.PAUSED:
                await self._thaw(instance_id)
            await self._runtime.wait_task(instance_id, timeout_s=_FORCED_END_S)

    async def _thaw(self, instance_id: str) -> None:
        """Let a frozen process take the SIGKILL it was sent: in cgroup v1 it does so when it is thawed.

        With cgroup v2 it ends frozen, and runc may have thawed it to send the signal. Then there is nothing left to
        thaw, and the runtime refuses. Whether the process ended is for the wait that follows to say.
        """
        try:
            await self._runtime.resume_task(instance_id)
        except (FailedPrecondition, NotFound) as exc:
            _log.debug("container_not_thawed", instance_id=instance_id, error=str(exc))

    async def note_stop(self, live: Live) -> None:
        """Record that the run is told to end; called with the instance's lock held, before it is told.

        Should the agent die before it sees the end, the next one knows that it was asked for.
        """
        if not live.record.stop_asked:
            record = replace(live.record, stop_asked=True)
            await self._runtime.update_container(record)
            live.record = record

    async def settle(self, live: Live, *, requested: bool, seen: TaskExit | None = None) -> Observation:
        """Record how a run ended and let its shim go; called with the instance's lock held.

        What is recorded first is found again should the agent die before the task is removed.
        """
        instance_id = live.record.instance_id
        state = await self._runtime.task_state(instance_id)
        if state is not None and state.phase is not TaskPhase.STOPPED:
            return await self.observe(live.record, state)
        exit_code, exited_at = (0, None) if seen is None else (seen.exit_code, seen.exited_at)
        if state is not None:
            exit_code, exited_at = state.exit_code, state.exited_at
        ended = state is not None or seen is not None
        if ended and live.record.end is None and live.record.started_at is not None:
            end = end_of_run(
                exit_code,
                exited_at,
                oom_kills=self.oom_kills(instance_id, live),
                requested=requested or live.record.stop_asked,
                now=self._clock.now(),
            )
            record = replace(live.record, end=end)
            await self._runtime.update_container(record)
            live.record = record
        if state is not None:
            await self._runtime.delete_task(instance_id)
        live.forget_run()
        return await self.observe(live.record, None)

    async def _undo_half_start(self, live: Live) -> None:
        """An agent died between making the task and starting it: it never ran, whatever was recorded ahead."""
        await self.remove_task(live.record.instance_id)
        if live.record.started_at is not None and live.record.end is None:
            record = replace(live.record, started_at=None)
            await self._runtime.update_container(record)
            live.record = record

    def oom_kills(self, instance_id: str, live: Live) -> int:
        """How many of its processes the kernel killed for lack of memory, while its control group is there."""
        paths = live.cgroup or expected_paths(self.cgroup(instance_id), root=self._config.cgroup_root)
        return read_oom_kills(paths) or 0

    async def on_exit(self, event: TaskExit) -> Observation | None:
        """Settle the run that ended; None for what the platform knows or never cared for."""
        async with self.locks.hold(event.instance_id):
            try:
                live = await self.known(event.instance_id)
                if self._is_of_an_earlier_run(live, event):
                    return None
                asked_for = live.record.end is not None and live.record.end.requested
                observation = await self.settle(live, requested=False, seen=event)
                return None if asked_for else observation
            except NotFound:
                return None
            except Unavailable:
                raise
            except HypervisorError as exc:
                # One container that cannot be tidied up must not hold up the events of all others.
                _log.warning("container_exit_not_settled", instance_id=event.instance_id, error=str(exc))
                return None

    @staticmethod
    def _is_of_an_earlier_run(live: Live, event: TaskExit) -> bool:
        started = live.record.started_at
        return started is not None and event.exited_at is not None and event.exited_at < started

    async def on_oom(self, instance_id: str) -> Observation | None:
        """Tell of a process that was killed for lack of memory. Should it be the last one, the exit follows."""
        live = self.live.get(instance_id)
        if live is None or live.record.end is not None:
            return None
        observation = await self.observe(live.record, TaskState(phase=TaskPhase.RUNNING))
        return replace(
            observation,
            reason="OOM_KILLED",
            message="the kernel killed a process of it at its memory limit: raise spec.memory_mb",
        )

    async def resync(self) -> tuple[Observation, ...]:
        """Every instance as it is now, ended ones tidied up."""
        observations = []
        for observation in await self.list():
            instance_id = observation.instance_id
            async with self.locks.hold(instance_id):
                try:
                    adopted = await self.adopt(instance_id)
                except Unavailable:
                    raise
                except HypervisorError as exc:
                    _log.warning("container_not_adopted", instance_id=instance_id, error=str(exc))
                    adopted = observation
            if adopted is not None:
                observations.append(adopted)
        return tuple(observations)

    async def adopt(self, instance_id: str) -> Observation | None:
        """Take it over as another agent process left it; None when there is none. Called with its lock held."""
        container = await self._runtime.get_container(instance_id)
        if container is None or INSTANCE_ID not in container.labels:
            return None
        live = self.live.setdefault(instance_id, Live(self.record_of(container)))
        state = await self._runtime.task_state(instance_id)
        if state is None or state.phase is TaskPhase.STOPPED:
            return await self.settle(live, requested=False)
        if state.phase is TaskPhase.CREATED:
            if not live.pid:
                await self._undo_half_start(live)
            return await self.observe(live.record, None)
        self._fifos.adopt(instance_id)
        if live.cgroup is None:
            live.cgroup = self.locate(state.pid)
        return await self.observe(live.record, state)
