"""From a container's record and task to what the platform is told of the instance. Pure."""

import enum
import signal
from dataclasses import dataclass
from datetime import datetime

from hypervisor.agent.drivers.containerd.labels import Record, RunEnd
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

__all__ = ["TaskPhase", "TaskState", "end_of_run", "observe", "parse_signal"]

_KILLED_BY_SIGKILL = 128 + signal.SIGKILL


class TaskPhase(enum.Enum):
    """What a task is doing."""

    CREATED = enum.auto()
    RUNNING = enum.auto()
    PAUSED = enum.auto()
    STOPPED = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """A container's task (its init process and the shim that holds it)."""

    phase: TaskPhase
    pid: int = 0
    exit_code: int = 0
    exited_at: datetime | None = None


def parse_signal(text: str) -> int:
    """The number of an image's stop signal (``SIGTERM``, ``TERM`` or ``15``); SIGTERM for an unknown one."""
    if text.isascii() and text.isdigit():
        number = int(text[:4])
        return number if 0 < number < signal.NSIG else int(signal.SIGTERM)
    name = text.upper()
    found = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
    return int(found or signal.SIGTERM)


def end_of_run(
    exit_code: int, exited_at: datetime | None, *, oom_kills: int, requested: bool, now: datetime
) -> RunEnd:
    """How a run ended, from its exit code and the kernel's count of OOM kills in its cgroup."""
    if oom_kills > 0 and exit_code == _KILLED_BY_SIGKILL and not requested:
        reason = "OOM_KILLED"
    elif exit_code > 128 and exit_code - 128 < signal.NSIG:
        reason = "KILLED"
    else:
        reason = "EXITED"
    return RunEnd(exit_code=exit_code, finished_at=exited_at or now, reason=reason, requested=requested)


def _message(end: RunEnd) -> str:
    if end.reason == "OOM_KILLED":
        return "it needed more than its memory limit and was killed: raise spec.memory_mb"
    if end.reason == "KILLED":
        number = end.exit_code - 128
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"it was ended by {name}" + (" as asked" if end.requested else "")
    return f"it ended with exit code {end.exit_code}"


def observe(record: Record, task: TaskState | None, *, runtime: str, now: datetime) -> Observation:
    """The observation. A task that has ended is described by the record once its end is recorded there."""
    status, reason, message = InstanceStatus.STOPPED, "", ""
    end: RunEnd | None = None
    if task is not None and task.phase in (TaskPhase.RUNNING, TaskPhase.PAUSED):
        status = InstanceStatus.RUNNING if task.phase is TaskPhase.RUNNING else InstanceStatus.PAUSED
    else:
        end = record.end
        if end is not None:
            failed = not end.requested and (end.exit_code != 0)
            status = InstanceStatus.FAILED if failed else InstanceStatus.STOPPED
            reason, message = end.reason, _message(end)
        elif record.started_at is not None:
            status, reason = InstanceStatus.FAILED, "TASK_LOST"
            message = "containerd lost its process: the machine was restarted or the shim was killed"
    return Observation(
        instance_id=record.instance_id,
        generation=record.generation,
        epoch=record.epoch,
        status=status,
        observed_at=now,
        reason=reason,
        message=message,
        exit_code=None if end is None else end.exit_code,
        started_at=record.started_at,
        finished_at=None if end is None else end.finished_at,
        runtime=runtime,
    )
