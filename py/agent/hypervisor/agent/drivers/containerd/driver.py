"""The containerd driver: the ``Driver`` contract over images, runtime, console and events of this package."""

import asyncio
import random
import re
import resource
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog
from containerd_api.services.containers.v1 import containers_pb2
from msgspec.structs import replace

from hypervisor.agent.drivers.containerd import oci
from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.config import ContainerdConfig
from hypervisor.agent.drivers.containerd.console import ConsoleFifos, FifoConsole
from hypervisor.agent.drivers.containerd.events import EventFeed, EventHandlers, TaskExit
from hypervisor.agent.drivers.containerd.images import ImageStore, ResolvedImage
from hypervisor.agent.drivers.containerd.keyed_locks import KeyedLocks
from hypervisor.agent.drivers.containerd.labels import INSTANCE_ID, Record
from hypervisor.agent.drivers.containerd.observing import (
    TaskPhase,
    TaskState,
    end_of_run,
    observe,
    parse_signal,
)
from hypervisor.agent.drivers.containerd.runtime import Mounts, Runtime
from hypervisor.agent.drivers.containerd.runtime_spec import MAX_OPEN_FILES, HostFeatures, build_runtime_spec
from hypervisor.agent.drivers.containerd.start_errors import explain_start_failure
from hypervisor.agent.drivers.driver import VERBS, Assignment, Console, Handle
from hypervisor.agent.stats.cgroups import CgroupPaths, cgroup_paths, expected_paths, swap_is_limited
from hypervisor.agent.stats.sampler import CgroupSampler, read_oom_kills
from hypervisor.core.clock import Clock
from hypervisor.core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from hypervisor.core.ids import IdSource
from hypervisor.core.model import Capability, ConsoleSize, DriverInfo, InstanceStats, Observation
from hypervisor.core.names import shorten
from hypervisor.core.states import InstanceStatus, InstanceType

__all__ = ["ContainerdDriver"]

NAME = "containerd"
_PROBE_TIMEOUT_S = 5.0
_FORCED_END_S = 30.0
"""How long a process may take to end after SIGKILL before the stop is given up."""
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
_MAX_IDENTIFIER = 76

_log = structlog.get_logger()


@dataclass(slots=True)
class _Live:
    """What this process remembers of an instance; everything can be found again without it."""

    record: Record
    mounts: Mounts | None = None
    never_started: bool = False
    cgroup: CgroupPaths | None = None
    sampler: CgroupSampler | None = None
    pid: int = 0
    console: FifoConsole | None = None

    def forget_run(self) -> None:
        """Drop what belonged to the run that ended."""
        if self.sampler is not None:
            self.sampler.close()
        self.sampler, self.cgroup, self.pid = None, None, 0


def _host_features(config: ContainerdConfig) -> HostFeatures:
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files == resource.RLIM_INFINITY:
        open_files = MAX_OPEN_FILES
    return HostFeatures(
        architecture=oci.host_architecture(),
        swap_limit=swap_is_limited(config.cgroup_root),
        # The agent and containerd live under the same limits, and runc fails where a limit cannot be raised.
        open_files=min(open_files, MAX_OPEN_FILES),
    )


class ContainerdDriver:
    """See hypervisor.agent.drivers.driver. Owns its connection; ``aclose`` ends it and leaves containers running."""

    def __init__(
        self, config: ContainerdConfig, *, clock: Clock, new_id: IdSource, rng: random.Random
    ) -> None:
        self._config = config
        self._clock = clock
        self._client = Client(config.address, namespace=config.namespace, timeout_s=config.rpc_timeout_s)
        self._runtime = Runtime(self._client, config)
        self._images = ImageStore(self._client, config, clock=clock, new_id=new_id)
        self._fifos = ConsoleFifos(config.console_root, buffer_bytes=config.console_buffer_bytes)
        self._locks = KeyedLocks()
        self._live: dict[str, _Live] = {}
        self._version = ""
        self._host = _host_features(config)
        self._feed = EventFeed(
            self._client,
            EventHandlers(on_exit=self._on_exit, on_oom=self._on_oom, resync=self._resync),
            namespace=config.namespace,
            clock=clock,
            rng=rng,
        )

    @property
    def name(self) -> str:
        """``containerd``."""
        return NAME

    # Create and delete.

    async def create(self, assignment: Assignment) -> Handle:
        """Resolve the image, record the container, make its file system."""
        instance_id = assignment.instance_id
        if len(instance_id) > _MAX_IDENTIFIER or not _IDENTIFIER.fullmatch(instance_id):
            raise InvalidArgument.of_field("id", f"{shorten(instance_id)} cannot name a container")
        if assignment.type is not InstanceType.CONTAINER:
            raise InvalidArgument.of_field("type", f"containerd runs containers, not {assignment.type}")
        image = await self._images.resolve(assignment.spec.image)
        spec = build_runtime_spec(
            assignment.spec,
            hostname=assignment.name,
            config=image.config,
            account=image.account,
            cgroups_path=self._cgroup(instance_id),
            host=self._host,
        )
        record = Record(
            instance_id=instance_id,
            generation=assignment.generation,
            epoch=assignment.epoch,
            name=assignment.name,
            project=assignment.project,
            stop_signal=parse_signal(image.config.stop_signal)
            if image.config.stop_signal
            else signal.SIGTERM,
        )
        async with self._locks.hold(instance_id):
            try:
                await self._runtime.create_container(record, image=image.name, spec=spec)
            except AlreadyExists:
                record = await self._take_over(record, image, spec)
                created = False
            else:
                created = True
            try:
                mounts = await self._prepare(instance_id, image)
            except BaseException:
                if created:
                    await asyncio.shield(self._undo_create(instance_id))
                raise
            live = self._live.get(instance_id)
            if live is None:
                self._live[instance_id] = _Live(record, mounts=mounts, never_started=created)
            else:
                live.record = record
        return {"container": instance_id, "namespace": self._config.namespace, "image": image.name}

    async def _take_over(self, wanted: Record, image: ResolvedImage, spec: dict[str, object]) -> Record:
        """The record of a create that is repeated: same image, labels and specification as they are wanted now."""
        container = await self._container(wanted.instance_id)
        if container.image != image.name:
            raise AlreadyExists(
                f"instance {wanted.instance_id} is on this node with the image {container.image}: delete it first",
                reason="INSTANCE_EXISTS",
                metadata={"instance_id": wanted.instance_id, "image": container.image},
            )
        old = self._record_of(container)
        record = replace(wanted, started_at=old.started_at, end=old.end)
        await self._runtime.update_container(record, spec=spec)
        return record

    async def _prepare(self, instance_id: str, image: ResolvedImage) -> Mounts | None:
        try:
            return await self._runtime.prepare_snapshot(instance_id, parent=image.chain_id)
        except AlreadyExists:
            return None
        except NotFound:
            await self._images.unpack_again(image)
            return await self._runtime.prepare_snapshot(instance_id, parent=image.chain_id)

    async def _undo_create(self, instance_id: str) -> None:
        try:
            await self._runtime.remove_snapshot(instance_id)
            await self._runtime.delete_container(instance_id)
        except HypervisorError as exc:
            # The record stays, so a delete or a repeated create finds what is left.
            _log.warning("container_create_not_undone", instance_id=instance_id, error=str(exc))

    async def delete(self, instance_id: str) -> bool:
        """End and remove it; the container record goes last, so that an interrupted delete can be repeated."""
        async with self._locks.hold(instance_id):
            existed = await self._remove_task(instance_id)
            live = self._live.get(instance_id)
            if live is not None:
                live.forget_run()
                if live.console is not None:
                    await live.console.close()
            existed |= await self._runtime.remove_snapshot(instance_id)
            existed |= self._fifos.remove(instance_id)
            existed |= await self._runtime.delete_container(instance_id)
            self._live.pop(instance_id, None)
            return existed

    async def _remove_task(self, instance_id: str) -> bool:
        """Kill and remove the task, whatever it does; returns whether there was one."""
        state = await self._runtime.task_state(instance_id)
        if state is None:
            return False
        if state.phase is not TaskPhase.STOPPED:
            await self._kill(instance_id, state)
        await self._runtime.delete_task(instance_id)
        return True

    async def _kill(self, instance_id: str, state: TaskState) -> None:
        if await self._runtime.kill_task(instance_id, signal.SIGKILL, all_processes=True):
            if state.phase is TaskPhase.PAUSED:
                # A frozen process (cgroup v1) takes its signals when it is thawed.
                await self._runtime.resume_task(instance_id)
            await self._runtime.wait_task(instance_id, timeout_s=_FORCED_END_S)

    # Start and stop.

    async def start(self, instance_id: str) -> Observation:
        """Make a task and let it run."""
        async with self._locks.hold(instance_id):
            live = await self._known(instance_id)
            if not live.never_started:
                state = await self._runtime.task_state(instance_id)
                if state is not None:
                    if state.phase in (TaskPhase.RUNNING, TaskPhase.PAUSED):
                        return await self._observe(live.record, state)
                    # Ended and not yet tidied up, or made by an agent that died before it could start it.
                    await self._remove_task(instance_id)
                    live.forget_run()
            return await self._start(instance_id, live)

    async def _start(self, instance_id: str, live: _Live) -> Observation:
        mounts = live.mounts
        if mounts is None:
            try:
                mounts = live.mounts = await self._runtime.mounts(instance_id)
            except NotFound as exc:
                raise FailedPrecondition(
                    f"instance {instance_id} has no file system, its create was interrupted: create it again",
                    reason="CREATE_INCOMPLETE",
                    metadata={"instance_id": instance_id},
                ) from exc
        stdin, stdout = self._fifos.make(instance_id)
        record = replace(live.record, started_at=self._clock.now(), end=None)
        try:
            live.pid = await self._runtime.create_task(
                instance_id, mounts=mounts, stdin=str(stdin), stdout=str(stdout)
            )
            live.cgroup = self._locate(live.pid)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._runtime.update_container(record))
                group.create_task(self._runtime.start_task(instance_id))
        except BaseException as exc:
            live.forget_run()
            await asyncio.shield(self._undo_start(instance_id))
            error = exc.exceptions[0] if isinstance(exc, BaseExceptionGroup) else exc
            if isinstance(error, HypervisorError):
                raise explain_start_failure(error) from exc
            raise
        live.record, live.never_started = record, False
        return await self._observe(record, TaskState(phase=TaskPhase.RUNNING, pid=live.pid))

    async def _undo_start(self, instance_id: str) -> None:
        try:
            await self._remove_task(instance_id)
        except HypervisorError as exc:
            # The next start or the delete removes it.
            _log.warning("container_start_not_undone", instance_id=instance_id, error=str(exc))
        self._fifos.release(instance_id)

    async def stop(self, instance_id: str, *, grace_s: float) -> Observation:
        """The image's stop signal (SIGTERM), then SIGKILL for all of its processes."""
        async with self._locks.hold(instance_id):
            live = await self._known(instance_id)
            state = await self._runtime.task_state(instance_id)
            requested = state is not None and state.phase is not TaskPhase.STOPPED
            if state is not None and requested:
                await self._end_politely(instance_id, live, state, grace_s=grace_s)
            observation = await self._settle(live, requested=requested)
            if requested:
                self._fifos.release(instance_id)
            return observation

    async def _end_politely(self, instance_id: str, live: _Live, state: TaskState, *, grace_s: float) -> None:
        if grace_s > 0 and state.phase is TaskPhase.RUNNING:
            if not await self._runtime.kill_task(instance_id, live.record.stop_signal, all_processes=False):
                return
            try:
                await self._runtime.wait_task(instance_id, timeout_s=grace_s)
                return
            except DeadlineExceeded:
                _log.info("container_stop_forced", instance_id=instance_id, grace_s=grace_s)
        await self._kill(instance_id, state)

    async def restart(self, instance_id: str, *, grace_s: float) -> Observation:
        """Stop and start."""
        await self.stop(instance_id, grace_s=grace_s)
        return await self.start(instance_id)

    # The end of a run.

    async def _settle(self, live: _Live, *, requested: bool, seen: TaskExit | None = None) -> Observation:
        """Record how a run ended and let its shim go; called with the instance's lock held.

        What is recorded first is found again should the agent die before the task is removed.
        """
        instance_id = live.record.instance_id
        state = await self._runtime.task_state(instance_id)
        if state is not None and state.phase is not TaskPhase.STOPPED:
            return await self._observe(live.record, state)
        exit_code, exited_at = (0, None) if seen is None else (seen.exit_code, seen.exited_at)
        if state is not None:
            exit_code, exited_at = state.exit_code, state.exited_at
        ended = state is not None or seen is not None
        if ended and live.record.end is None and live.record.started_at is not None:
            end = end_of_run(
                exit_code,
                exited_at,
                oom_kills=self._oom_kills(instance_id, live),
                requested=requested,
                now=self._clock.now(),
            )
            record = replace(live.record, end=end)
            await self._runtime.update_container(record)
            live.record = record
        if state is not None:
            await self._runtime.delete_task(instance_id)
        live.forget_run()
        return await self._observe(live.record, None)

    def _oom_kills(self, instance_id: str, live: _Live) -> int:
        paths = live.cgroup or expected_paths(self._cgroup(instance_id), root=self._config.cgroup_root)
        return read_oom_kills(paths) or 0

    async def _on_exit(self, event: TaskExit) -> Observation | None:
        async with self._locks.hold(event.instance_id):
            try:
                live = await self._known(event.instance_id)
                if self._is_of_an_earlier_run(live, event):
                    return None
                asked_for = live.record.end is not None and live.record.end.requested
                observation = await self._settle(live, requested=False, seen=event)
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
    def _is_of_an_earlier_run(live: _Live, event: TaskExit) -> bool:
        started = live.record.started_at
        return started is not None and event.exited_at is not None and event.exited_at < started

    async def _on_oom(self, instance_id: str) -> Observation | None:
        live = self._live.get(instance_id)
        if live is None or live.record.end is not None:
            return None
        observation = await self._observe(live.record, TaskState(phase=TaskPhase.RUNNING))
        return replace(
            observation,
            reason="OOM_KILLED",
            message="the kernel killed a process of it at its memory limit: raise spec.memory_mb",
        )

    async def _resync(self) -> tuple[Observation, ...]:
        """Every instance as it is now, ended ones tidied up."""
        observations = []
        for observation in await self.list():
            instance_id = observation.instance_id
            async with self._locks.hold(instance_id):
                try:
                    adopted = await self._adopt(instance_id)
                except Unavailable:
                    raise
                except HypervisorError as exc:
                    _log.warning("container_not_adopted", instance_id=instance_id, error=str(exc))
                    adopted = observation
            if adopted is not None:
                observations.append(adopted)
        return tuple(observations)

    # Look.

    async def get(self, instance_id: str) -> Observation:
        """The container and its task, as containerd has them now."""
        container, state = await asyncio.gather(
            self._container(instance_id), self._runtime.task_state(instance_id)
        )
        return await self._observe(self._record_of(container), state)

    async def list(self) -> tuple[Observation, ...]:
        """Every container with our labels."""
        containers, tasks = await asyncio.gather(self._runtime.list_containers(), self._runtime.list_tasks())
        observations = []
        for container in containers:
            try:
                record = self._record_of(container)
            except FailedPrecondition as exc:
                _log.warning("container_labels_unreadable", container=container.id, error=str(exc))
                continue
            observations.append(await self._observe(record, tasks.get(container.id)))
        return tuple(observations)

    async def stats(self, instance_id: str) -> InstanceStats:
        """A sample of its control group and network namespace."""
        live = await self._known(instance_id)
        if live.sampler is None:
            state = await self._running(instance_id)
            live.pid = state.pid
            paths = live.cgroup or self._locate(state.pid)
            if paths is None:
                raise self._not_running(instance_id)
            if live.sampler is None:
                live.sampler = CgroupSampler(paths, pid=state.pid, proc_root=self._config.proc_root)
        try:
            return live.sampler.sample(self._clock)
        except OSError as exc:
            live.forget_run()
            raise self._not_running(instance_id) from exc

    async def attach(self, instance_id: str) -> Console:
        """Its terminal; one that ended by itself can be attached to while there is output nobody has read."""
        live = await self._known(instance_id)
        if not self._fifos.unread_bytes(instance_id):
            await self._running(instance_id)
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

        async def resize(size: ConsoleSize) -> None:
            await self._runtime.resize(instance_id, size)

        def closed() -> None:
            live.console = None

        live.console = FifoConsole(instance_id, reader=reader, writer=writer, resize=resize, on_close=closed)
        return live.console

    async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
        """Adopt it: its labels and its task say everything, the handle only that there was something."""
        async with self._locks.hold(instance_id):
            return await self._adopt(instance_id)

    async def _adopt(self, instance_id: str) -> Observation | None:
        container = await self._runtime.get_container(instance_id)
        if container is None or INSTANCE_ID not in container.labels:
            return None
        live = self._live.setdefault(instance_id, _Live(self._record_of(container)))
        state = await self._runtime.task_state(instance_id)
        if state is None or state.phase is TaskPhase.STOPPED:
            return await self._settle(live, requested=False)
        if state.phase is TaskPhase.CREATED:
            if not live.pid:
                # An agent died between making the task and starting it.
                await self._remove_task(instance_id)
            return await self._observe(live.record, None)
        self._fifos.adopt(instance_id)
        if live.cgroup is None:
            live.cgroup = self._locate(state.pid)
        return await self._observe(live.record, state)

    def events(self) -> AsyncIterator[Observation]:
        """Exits and OOM kills; see :mod:`.events`."""
        return self._feed

    async def info(self) -> DriverInfo:
        """Whether containerd answers."""
        try:
            self._version = await self._runtime.version(timeout_s=_PROBE_TIMEOUT_S)
        except HypervisorError as exc:
            available, reason = False, exc.message
        else:
            available, reason = True, ""
        return DriverInfo(
            name=NAME,
            types=(InstanceType.CONTAINER,),
            available=available,
            reason=reason,
            version=self._version,
            capabilities=tuple(Capability(verb=verb, supported=True) for verb in VERBS),
        )

    async def aclose(self) -> None:
        """End events, consoles and the connection."""
        await self._feed.aclose()
        for live in self._live.values():
            live.forget_run()
            if live.console is not None:
                await live.console.close()
        self._live.clear()
        self._fifos.close()
        await self._client.aclose()

    # What the above share.

    def _cgroup(self, instance_id: str) -> str:
        return f"/{self._config.namespace}/{instance_id}"

    def _locate(self, pid: int) -> CgroupPaths | None:
        try:
            text = (self._config.proc_root / str(pid) / "cgroup").read_text("utf-8")
        except OSError:
            # It ended a moment ago.
            return None
        return cgroup_paths(text, root=self._config.cgroup_root)

    async def _observe(self, record: Record, state: TaskState | None) -> Observation:
        if not self._version:
            self._version = await self._runtime.version(timeout_s=_PROBE_TIMEOUT_S)
        if state is not None and state.phase is TaskPhase.STOPPED and record.end is None:
            live = self._live.get(record.instance_id)
            kills = 0 if live is None else self._oom_kills(record.instance_id, live)
            end = end_of_run(
                state.exit_code, state.exited_at, oom_kills=kills, requested=False, now=self._clock.now()
            )
            record = replace(record, end=end)
        return observe(record, state, runtime=f"{NAME} {self._version}", now=self._clock.now())

    async def _known(self, instance_id: str) -> _Live:
        live = self._live.get(instance_id)
        if live is None:
            record = self._record_of(await self._container(instance_id))
            live = self._live.setdefault(instance_id, _Live(record))
        return live

    async def _container(self, instance_id: str) -> containers_pb2.Container:
        container = await self._runtime.get_container(instance_id)
        # Another program may keep containers in the namespace too: one without our label is none of ours.
        if container is None or INSTANCE_ID not in container.labels:
            self._live.pop(instance_id, None)
            raise NotFound(
                f"containerd has no instance {instance_id} in namespace {self._config.namespace}",
                reason="INSTANCE_NOT_FOUND",
                metadata={"instance_id": instance_id},
            )
        return container

    def _record_of(self, container: containers_pb2.Container) -> Record:
        try:
            return Record.from_labels(dict(container.labels))
        except ValueError as exc:
            raise FailedPrecondition(
                f"the labels of container {container.id} were changed ({exc}): remove it with ctr",
                reason="CONTAINER_UNREADABLE",
                metadata={"container": container.id},
            ) from exc

    async def _running(self, instance_id: str) -> TaskState:
        state = await self._runtime.task_state(instance_id)
        if state is None or state.phase not in (TaskPhase.RUNNING, TaskPhase.PAUSED):
            raise self._not_running(instance_id)
        return state

    @staticmethod
    def _not_running(instance_id: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"instance {instance_id} does not run: start it first",
            reason="NOT_RUNNING",
            metadata={"instance_id": instance_id, "status": InstanceStatus.STOPPED},
        )
