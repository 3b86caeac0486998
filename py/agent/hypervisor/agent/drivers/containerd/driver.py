"""The containerd driver: the ``Driver`` contract over images, runtime, console and events of this package."""

import asyncio
import os
import random
import re
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
from msgspec.structs import replace

from hypervisor.agent.drivers.containerd import oci
from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.config import ContainerdConfig
from hypervisor.agent.drivers.containerd.events import EventFeed, EventHandlers
from hypervisor.agent.drivers.containerd.images import ImageStore, ResolvedImage
from hypervisor.agent.drivers.containerd.labels import Record
from hypervisor.agent.drivers.containerd.observing import (
    TaskPhase,
    TaskState,
    parse_signal,
)
from hypervisor.agent.drivers.containerd.runtime import Mounts, Runtime
from hypervisor.agent.drivers.containerd.runtime_spec import MAX_OPEN_FILES, HostFeatures, build_runtime_spec
from hypervisor.agent.drivers.containerd.start_errors import explain_start_failure
from hypervisor.agent.drivers.containerd.swap_limit import forbid_swap, specification_limits_swap
from hypervisor.agent.drivers.containerd.tracking import DRIVER_NAME, Live, Tracker
from hypervisor.agent.drivers.containerd.updating import update_limits
from hypervisor.agent.drivers.cpu_quota import apply_cpu_limit, cpu_limit
from hypervisor.agent.drivers.driver import VERBS, Assignment, Console, Handle
from hypervisor.agent.drivers.fifo_console import ConsoleFifos, FifoConsole
from hypervisor.agent.drivers.local_images import local_image
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.agent.stats.cgroups import sampler_sources
from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.clock import Clock
from hypervisor.core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    InvalidArgument,
    NotFound,
)
from hypervisor.core.ids import IdSource
from hypervisor.core.model import Capability, ConsoleSize, DriverInfo, Observation, Sizes
from hypervisor.core.names import shorten
from hypervisor.core.states import InstanceType

__all__ = ["ContainerdDriver"]

_SHIM_OPENS_WITHIN_S = 1.0
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
_MAX_IDENTIFIER = 76

_NO_STATE = "containerd keeps no memory or disk state of a container to go back to"
_LACKS = {
    "suspend": _NO_STATE,
    "snapshot": _NO_STATE,
    "snapshot-diff": _NO_STATE,
}

_log = structlog.get_logger()


def _host_features(config: ContainerdConfig) -> HostFeatures:
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files == resource.RLIM_INFINITY:
        open_files = MAX_OPEN_FILES
    return HostFeatures(
        architecture=oci.host_architecture(),
        swap_limit=specification_limits_swap(config.cgroup_root),
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
        self._tracker = Tracker(self._runtime, self._fifos, config, clock=clock)
        self._host = _host_features(config)
        self._feed = EventFeed(
            self._client,
            EventHandlers(
                on_exit=self._tracker.on_exit, on_oom=self._tracker.on_oom, resync=self._tracker.resync
            ),
            namespace=config.namespace,
            clock=clock,
            rng=rng,
        )

    @property
    def name(self) -> str:
        """``containerd``."""
        return DRIVER_NAME

    # Create and delete.

    async def create(self, assignment: Assignment) -> Handle:
        """Resolve the image, record the container, make its file system."""
        instance_id = assignment.instance_id
        if len(instance_id) > _MAX_IDENTIFIER or not _IDENTIFIER.fullmatch(instance_id):
            raise InvalidArgument.of_field("id", f"{shorten(instance_id)} cannot name a container")
        if assignment.type is not InstanceType.CONTAINER:
            raise InvalidArgument.of_field("type", f"containerd runs containers, not {assignment.type}")
        local = local_image(assignment, "image")
        image = await self._images.resolve(
            assignment.spec.image, archive=None if local is None else Path(local.path)
        )
        spec = build_runtime_spec(
            assignment.spec,
            hostname=assignment.name,
            config=image.config,
            account=image.account,
            cgroups_path=self._tracker.cgroup(instance_id),
            host=self._host,
        )
        record = Record(
            instance_id=instance_id,
            generation=assignment.generation,
            epoch=assignment.epoch,
            name=assignment.name,
            project=assignment.project,
            stop_signal=parse_signal(image.config.stop_signal or "SIGTERM"),
            cpu_millis=assignment.spec.cpu_millis,
        )
        async with self._tracker.locks.hold(instance_id):
            making = asyncio.ensure_future(self._make(record, image, spec))
            try:
                await uninterrupted(making)
            except asyncio.CancelledError:
                if not making.cancelled() and making.exception() is None and making.result():
                    await self._undo_create(instance_id)
                raise
        return {"container": instance_id, "namespace": self._config.namespace, "image": image.name}

    async def _make(self, record: Record, image: ResolvedImage, spec: dict[str, object]) -> bool:
        """Record and file system; returns whether they are new. What fails removes what it made."""
        instance_id = record.instance_id
        try:
            await self._runtime.create_container(record, image=image.name, spec=spec)
        except AlreadyExists:
            record, created = await self._take_over(record, image, spec), False
        else:
            created = True
        try:
            mounts = await self._prepare(instance_id, image)
        except HypervisorError:
            if created:
                await self._undo_create(instance_id)
            raise
        live = self._tracker.live.get(instance_id)
        if live is None:
            self._tracker.live[instance_id] = Live(record, mounts=mounts, never_started=created)
        else:
            live.record = record
        return created

    async def _take_over(self, wanted: Record, image: ResolvedImage, spec: dict[str, object]) -> Record:
        """The record of a create that is repeated: same image, labels and specification as they are wanted now."""
        container = await self._tracker.container(wanted.instance_id)
        if container.image != image.name:
            raise AlreadyExists(
                f"instance {wanted.instance_id} is on this node with the image {container.image}: delete it first",
                reason="INSTANCE_EXISTS",
                metadata={"instance_id": wanted.instance_id, "image": container.image},
            )
        old = self._tracker.record_of(container)
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
        self._tracker.live.pop(instance_id, None)
        try:
            await self._runtime.remove_snapshot(instance_id)
            await self._runtime.delete_container(instance_id)
        except HypervisorError as exc:
            # The record stays, so a delete or a repeated create finds what is left.
            _log.warning("container_create_not_undone", instance_id=instance_id, error=str(exc))

    async def delete(self, instance_id: str) -> bool:
        """End and remove it; the container record goes last, so that an interrupted delete can be repeated."""
        async with self._tracker.locks.hold(instance_id):
            existed = await self._tracker.remove_task(instance_id)
            live = self._tracker.live.get(instance_id)
            if live is not None:
                live.forget_run()
                if live.console is not None:
                    await live.console.close()
            existed |= await self._runtime.remove_snapshot(instance_id)
            existed |= self._fifos.remove(instance_id)
            existed |= await self._runtime.delete_container(instance_id)
            self._tracker.live.pop(instance_id, None)
            return existed

    # Start and stop.

    async def start(self, instance_id: str) -> Observation:
        """Make a task and let it run."""
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            if not live.never_started:
                state = await self._runtime.task_state(instance_id)
                if state is not None:
                    if state.phase in (TaskPhase.RUNNING, TaskPhase.PAUSED):
                        return await self._tracker.observe(live.record, state)
                    # Ended and not yet tidied up, or made by an agent that died before it could start it.
                    await self._tracker.remove_task(instance_id)
                    live.forget_run()
            return await uninterrupted(self._start(instance_id, live))

    async def _start(self, instance_id: str, live: Live) -> Observation:
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
        record = replace(live.record, started_at=self._clock.now(), stop_asked=False, end=None)
        recorded = False
        try:
            live.pid = await self._runtime.create_task(
                instance_id, mounts=mounts, stdin=str(stdin), stdout=str(stdout)
            )
            live.cgroup = self._tracker.locate(live.pid)
            self._limit(live)
            recorded = True
            async with asyncio.TaskGroup() as group:
                group.create_task(self._runtime.update_container(record))
                group.create_task(self._runtime.start_task(instance_id))
        except BaseException as exc:
            live.forget_run()
            await self._undo_start(live, recorded=recorded)
            error = exc.exceptions[0] if isinstance(exc, BaseExceptionGroup) else exc
            if isinstance(error, HypervisorError):
                raise explain_start_failure(error) from exc
            raise
        live.record, live.never_started = record, False
        return await self._tracker.observe(record, TaskState(phase=TaskPhase.RUNNING, pid=live.pid))

    @staticmethod
    def _limit(live: Live) -> None:
        try:
            if live.cgroup is None:
                raise FileNotFoundError("the process has no control group")
            apply_cpu_limit(live.cgroup, cpu_limit(live.record.cpu_millis))
            forbid_swap(live.cgroup)
        except OSError as exc:
            raise FailedPrecondition(
                f"instance {live.record.instance_id} cannot be limited to {live.record.cpu_millis} thousandths of a "
                f"core and to no swap ({exc}): check that the node's cpu controller is enabled",
                reason="LIMIT_REFUSED",
                metadata={"instance_id": live.record.instance_id},
            ) from exc

    async def _undo_start(self, live: Live, *, recorded: bool) -> None:
        instance_id = live.record.instance_id
        try:
            await self._tracker.remove_task(instance_id)
            if recorded:
                await self._runtime.update_container(live.record)
        except HypervisorError as exc:
            # The next start or the delete removes it.
            _log.warning("container_start_not_undone", instance_id=instance_id, error=str(exc))
        self._fifos.release(instance_id)

    async def stop(self, instance_id: str, *, grace_s: float) -> Observation:
        """The image's stop signal (SIGTERM), then SIGKILL for all of its processes."""
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            state = await self._runtime.task_state(instance_id)
            requested = state is not None and state.phase is not TaskPhase.STOPPED
            if state is not None and requested:
                await self._tracker.note_stop(live)
                await self._end_politely(instance_id, live, state, grace_s=grace_s)
            observation = await self._tracker.settle(live, requested=requested)
            if requested:
                self._fifos.release(instance_id)
            return observation

    async def _end_politely(self, instance_id: str, live: Live, state: TaskState, *, grace_s: float) -> None:
        if grace_s > 0 and state.phase is TaskPhase.RUNNING:
            if not await self._runtime.kill_task(instance_id, live.record.stop_signal, all_processes=False):
                return
            try:
                await self._runtime.wait_task(instance_id, timeout_s=grace_s)
                return
            except DeadlineExceeded:
                _log.info("container_stop_forced", instance_id=instance_id, grace_s=grace_s)
        await self._tracker.kill(instance_id, state)

    async def restart(self, instance_id: str, *, grace_s: float) -> Observation:
        """Stop and start."""
        await self.stop(instance_id, grace_s=grace_s)
        return await self.start(instance_id)

    async def update(self, instance_id: str, sizes: Sizes) -> Observation:
        """Other limits, at once and for later starts."""
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            return await uninterrupted(update_limits(self._runtime, self._tracker, live, sizes))

    async def pause(self, instance_id: str) -> Observation:
        """Freeze its control group."""
        return await self._freeze(instance_id, TaskPhase.PAUSED)

    async def resume(self, instance_id: str) -> Observation:
        """Thaw its control group."""
        return await self._freeze(instance_id, TaskPhase.RUNNING)

    async def _freeze(self, instance_id: str, wanted: TaskPhase) -> Observation:
        async with self._tracker.locks.hold(instance_id):
            live = await self._tracker.known(instance_id)
            state = await self._runtime.task_state(instance_id)
            if state is None or state.phase not in (TaskPhase.RUNNING, TaskPhase.PAUSED):
                raise self._tracker.not_running(instance_id)
            if state.phase is not wanted:
                if wanted is TaskPhase.PAUSED:
                    await self._runtime.pause_task(instance_id)
                else:
                    await self._runtime.resume_task(instance_id)
                state = await self._runtime.task_state(instance_id)
            return await self._tracker.observe(live.record, state)

    # Look.

    async def get(self, instance_id: str) -> Observation:
        """The container and its task, as containerd has them now."""
        container, state = await asyncio.gather(
            self._tracker.container(instance_id), self._runtime.task_state(instance_id)
        )
        return await self._tracker.observe(self._tracker.record_of(container), state)

    async def list(self) -> tuple[Observation, ...]:
        """Every container with our labels."""
        return await self._tracker.list()

    async def stats_source(self, instance_id: str) -> StatsSource:
        """Its control group and the network namespace of its process."""
        live = await self._tracker.known(instance_id)
        state = await self._tracker.running(instance_id)
        live.pid = state.pid
        paths = live.cgroup or self._tracker.locate(state.pid)
        if paths is None:
            raise self._tracker.not_running(instance_id)
        return sampler_sources(paths, pid=state.pid, proc_root=self._config.proc_root)

    async def attach(self, instance_id: str) -> Console:
        """Its terminal; one that ended by itself can be attached to while there is output nobody has read."""
        live = await self._tracker.known(instance_id)
        state = await self._runtime.task_state(instance_id)
        runs = state is not None and state.phase is TaskPhase.RUNNING
        if not runs and not self._fifos.unread_bytes(instance_id):
            raise self._tracker.not_running(instance_id)
        if live.console is not None:
            raise FailedPrecondition(
                f"the console of {instance_id} is attached already: close that attachment first",
                reason="CONSOLE_ATTACHED",
                metadata={"instance_id": instance_id},
            )
        try:
            reader, writer = await self._open_console(instance_id, runs=runs)
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

    async def _open_console(self, instance_id: str, *, runs: bool) -> tuple[int, int | None]:
        deadline = self._clock.monotonic() + _SHIM_OPENS_WITHIN_S
        while True:
            reader, writer = self._fifos.open(instance_id)
            if writer is not None or not runs or self._clock.monotonic() >= deadline:
                return reader, writer
            # The shim opens its end of the input FIFO in the background of the start.
            os.close(reader)
            await self._clock.sleep(0.005)

    async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
        """Adopt it: its labels and its task say everything, the handle only that there was something."""
        async with self._tracker.locks.hold(instance_id):
            return await self._tracker.adopt(instance_id)

    def events(self) -> AsyncIterator[Observation]:
        """Exits and OOM kills; see :mod:`.events`."""
        return self._feed

    async def info(self) -> DriverInfo:
        """Whether containerd answers."""
        try:
            await self._tracker.probe()
        except HypervisorError as exc:
            available, reason = False, exc.message
        else:
            available, reason = True, ""
        return DriverInfo(
            name=DRIVER_NAME,
            types=(InstanceType.CONTAINER,),
            available=available,
            reason=reason,
            version=self._tracker.version,
            capabilities=tuple(
                Capability(verb=verb, supported=verb not in _LACKS, reason=_LACKS.get(verb, ""))
                for verb in VERBS
            ),
        )

    async def aclose(self) -> None:
        """End events, consoles and the connection."""
        await self._feed.aclose()
        for live in self._tracker.live.values():
            live.forget_run()
            if live.console is not None:
                await live.console.close()
        self._tracker.live.clear()
        self._fifos.close()
        await self._client.aclose()
