"""containerd's containers, snapshots and tasks as typed calls: one method per RPC, no decisions.

All raise what :meth:`Client.call` raises. Names of container, snapshot and task are the instance id.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from containerd_api.services.containers.v1 import containers_pb2
from containerd_api.services.snapshots.v1 import snapshots_pb2
from containerd_api.services.tasks.v1 import tasks_pb2
from containerd_api.types import mount_pb2
from containerd_api.types.task import task_pb2
from google.protobuf import any_pb2, empty_pb2, field_mask_pb2, timestamp_pb2

from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.config import ContainerdConfig
from hypervisor.agent.drivers.containerd.labels import INSTANCE_ID, Record
from hypervisor.agent.drivers.containerd.observing import TaskPhase, TaskState
from hypervisor.core.errors import FailedPrecondition, NotFound
from hypervisor.core.model import ConsoleSize

__all__ = ["Mounts", "Runtime", "moment"]

Mounts = Sequence[mount_pb2.Mount]

_SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_RESOURCES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
_CREATE_TIMEOUT_S = 120.0

_PHASES = {
    task_pb2.CREATED: TaskPhase.CREATED,
    task_pb2.RUNNING: TaskPhase.RUNNING,
    task_pb2.PAUSED: TaskPhase.PAUSED,
    task_pb2.PAUSING: TaskPhase.PAUSED,
    task_pb2.STOPPED: TaskPhase.STOPPED,
}


def moment(stamp: timestamp_pb2.Timestamp) -> datetime | None:
    """A time from containerd; None where it gives none (it then sends the year 1)."""
    return stamp.ToDatetime(UTC) if stamp.seconds > 0 else None


def _state(process: task_pb2.Process) -> TaskState | None:
    phase = _PHASES.get(process.status)
    if phase is None:
        return None
    return TaskState(
        phase=phase, pid=process.pid, exit_code=process.exit_status, exited_at=moment(process.exited_at)
    )


class Runtime:
    """See the module's docstring."""

    def __init__(self, client: Client, config: ContainerdConfig) -> None:
        self._client = client
        self._config = config

    async def version(self, *, timeout_s: float) -> str:
        """containerd's version, such as ``1.6.20``."""
        reply = await self._client.call(
            self._client.version.Version, empty_pb2.Empty(), what="ask for its version", timeout_s=timeout_s
        )
        return reply.version.removeprefix("v").partition("~")[0]

    # Containers.

    async def create_container(self, record: Record, *, image: str, spec: dict[str, Any]) -> None:
        """Record a container. From then on its snapshot is kept from being collected, made or not."""
        await self._client.call(
            self._client.containers.Create,
            containers_pb2.CreateContainerRequest(container=self._container(record, image=image, spec=spec)),
            what=f"record container {record.instance_id}",
        )

    async def update_container(self, record: Record, *, spec: dict[str, Any] | None = None) -> None:
        """Replace a container's labels, and its specification where one is given."""
        container = self._container(record, image="", spec=spec)
        paths = ["labels"] if spec is None else ["labels", "spec"]
        await self._client.call(
            self._client.containers.Update,
            containers_pb2.UpdateContainerRequest(
                container=container, update_mask=field_mask_pb2.FieldMask(paths=paths)
            ),
            what=f"update container {record.instance_id}",
        )

    def _container(
        self, record: Record, *, image: str, spec: dict[str, Any] | None
    ) -> containers_pb2.Container:
        document = None
        if spec is not None:
            document = any_pb2.Any(type_url=_SPEC_TYPE, value=json.dumps(spec).encode())
        return containers_pb2.Container(
            id=record.instance_id,
            labels=record.to_labels(),
            image=image,
            runtime=containers_pb2.Container.Runtime(name=self._config.runtime),
            spec=document,
            snapshotter=self._config.snapshotter,
            snapshot_key=record.instance_id,
        )

    async def get_container(self, instance_id: str) -> containers_pb2.Container | None:
        """The container, or None."""
        try:
            reply = await self._client.call(
                self._client.containers.Get,
                containers_pb2.GetContainerRequest(id=instance_id),
                what=f"look up container {instance_id}",
            )
        except NotFound:
            return None
        return reply.container

    async def list_containers(self) -> Sequence[containers_pb2.Container]:
        """Every container of ours in the namespace."""
        reply = await self._client.call(
            self._client.containers.List,
            containers_pb2.ListContainersRequest(filters=[f'labels."{INSTANCE_ID}"']),
            what="list containers",
        )
        return reply.containers

    async def delete_container(self, instance_id: str) -> bool:
        """Delete the record; returns whether there was one."""
        try:
            await self._client.call(
                self._client.containers.Delete,
                containers_pb2.DeleteContainerRequest(id=instance_id),
                what=f"delete container {instance_id}",
            )
        except NotFound:
            return False
        return True

    # Snapshots.

    async def prepare_snapshot(self, instance_id: str, *, parent: str) -> Mounts:
        """Make its writable file system on top of an image's."""
        reply = await self._client.call(
            self._client.snapshots.Prepare,
            snapshots_pb2.PrepareSnapshotRequest(
                snapshotter=self._config.snapshotter, key=instance_id, parent=parent
            ),
            what=f"make the file system of {instance_id}",
        )
        return reply.mounts

    async def mounts(self, instance_id: str) -> Mounts:
        """How to mount its file system."""
        reply = await self._client.call(
            self._client.snapshots.Mounts,
            snapshots_pb2.MountsRequest(snapshotter=self._config.snapshotter, key=instance_id),
            what=f"look up the file system of {instance_id}",
        )
        return reply.mounts

    async def remove_snapshot(self, instance_id: str) -> bool:
        """Remove its file system; returns whether there was one."""
        try:
            await self._client.call(
                self._client.snapshots.Remove,
                snapshots_pb2.RemoveSnapshotRequest(snapshotter=self._config.snapshotter, key=instance_id),
                what=f"remove the file system of {instance_id}",
            )
        except NotFound:
            return False
        return True

    # Tasks.

    async def create_task(self, instance_id: str, *, mounts: Mounts, stdin: str, stdout: str) -> int:
        """Start the shim and prepare the process; returns its pid. It runs only after ``start_task``."""
        reply = await self._client.call(
            self._client.tasks.Create,
            tasks_pb2.CreateTaskRequest(
                container_id=instance_id, rootfs=mounts, stdin=stdin, stdout=stdout, terminal=True
            ),
            what=f"make the process of {instance_id}",
            timeout_s=_CREATE_TIMEOUT_S,
        )
        return reply.pid

    async def start_task(self, instance_id: str) -> None:
        """Let the process run."""
        await self._client.call(
            self._client.tasks.Start,
            tasks_pb2.StartRequest(container_id=instance_id),
            what=f"start the process of {instance_id}",
        )

    async def pause_task(self, instance_id: str) -> None:
        """Freeze all its processes."""
        await self._client.call(
            self._client.tasks.Pause,
            tasks_pb2.PauseTaskRequest(container_id=instance_id),
            what=f"pause {instance_id}",
        )

    async def resume_task(self, instance_id: str) -> None:
        """Thaw it."""
        await self._client.call(
            self._client.tasks.Resume,
            tasks_pb2.ResumeTaskRequest(container_id=instance_id),
            what=f"resume {instance_id}",
        )

    async def update_task(self, instance_id: str, resources: Mapping[str, Any]) -> None:
        """Change the limits of a task that runs: ``resources`` of a runtime specification, as far as given."""
        await self._client.call(
            self._client.tasks.Update,
            tasks_pb2.UpdateTaskRequest(
                container_id=instance_id,
                resources=any_pb2.Any(type_url=_RESOURCES_TYPE, value=json.dumps(resources).encode()),
            ),
            what=f"change the limits of {instance_id}",
        )

    async def task_state(self, instance_id: str) -> TaskState | None:
        """The task, or None."""
        try:
            reply = await self._client.call(
                self._client.tasks.Get,
                tasks_pb2.GetRequest(container_id=instance_id),
                what=f"look up the process of {instance_id}",
            )
        except NotFound:
            return None
        return _state(reply.process)

    async def list_tasks(self) -> dict[str, TaskState]:
        """All tasks of the namespace by container."""
        reply = await self._client.call(
            self._client.tasks.List, tasks_pb2.ListTasksRequest(), what="list processes"
        )
        states = ((task.container_id or task.id, _state(task)) for task in reply.tasks)
        return {name: state for name, state in states if state is not None}

    async def kill_task(self, instance_id: str, number: int, *, all_processes: bool) -> bool:
        """Send a signal; returns whether there was a process to get it."""
        try:
            await self._client.call(
                self._client.tasks.Kill,
                tasks_pb2.KillRequest(container_id=instance_id, signal=number, all=all_processes),
                what=f"signal {instance_id}",
            )
        except NotFound:
            return False
        except FailedPrecondition as exc:
            # What shims say of a process that ended a moment ago.
            if "already finished" in exc.message or "not running" in exc.message:
                return False
            raise
        return True

    async def wait_task(self, instance_id: str, *, timeout_s: float) -> None:
        """Return once the process has ended, or there is none. ``DeadlineExceeded`` after ``timeout_s``."""
        try:
            await self._client.call(
                self._client.tasks.Wait,
                tasks_pb2.WaitRequest(container_id=instance_id),
                what=f"wait for the end of {instance_id}",
                timeout_s=timeout_s,
            )
        except NotFound:
            return

    async def delete_task(self, instance_id: str) -> bool:
        """Remove an ended (or never started) task with its shim and cgroup; returns whether there was one."""
        try:
            await self._client.call(
                self._client.tasks.Delete,
                tasks_pb2.DeleteTaskRequest(container_id=instance_id),
                what=f"remove the process of {instance_id}",
            )
        except NotFound:
            return False
        return True

    async def resize(self, instance_id: str, size: ConsoleSize) -> None:
        """Set its terminal's size."""
        await self._client.call(
            self._client.tasks.ResizePty,
            tasks_pb2.ResizePtyRequest(container_id=instance_id, width=size.width, height=size.height),
            what=f"resize the console of {instance_id}",
        )
