"""One instance of the fake runtime: its console, its made-up figures, and how it is observed."""

import asyncio
from dataclasses import dataclass
from datetime import datetime

from hypervisor.agent.drivers.fake_guest import FakeTerminal, Guest
from hypervisor.agent.drivers.fake_state import FakeRecord
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import ConsoleSize, Observation
from hypervisor.core.resources import MIB
from hypervisor.core.states import InstanceStatus

__all__ = ["FakeConsole", "FakeInstance", "figures_of", "not_running", "observe"]

_IDLE_SHARE = 0.02


@dataclass(slots=True)
class FakeInstance:
    """What the fake runtime has of an instance."""

    record: FakeRecord
    terminal: FakeTerminal
    wake: asyncio.Event
    guest: Guest | None = None
    timer: asyncio.Task[None] | None = None
    console: "FakeConsole | None" = None
    used: tuple[float, int] | None = None
    """Processor time in nanoseconds, and when that was."""


class FakeConsole:
    """The one attachment of an instance."""

    def __init__(self, instance: FakeInstance) -> None:
        self._instance = instance
        self._closed = False

    @property
    def resizable(self) -> bool:
        return True

    async def read(self, limit: int = 65536) -> bytes:
        instance = self._instance
        while not self._closed:
            instance.wake.clear()
            if data := instance.terminal.take(limit):
                return data
            if instance.guest is None or not instance.guest.alive:
                break
            await instance.wake.wait()
        return b""

    async def write(self, data: bytes) -> None:
        guest = self._instance.guest
        if guest is None or self._closed:
            raise not_running(self._instance.record.assignment.instance_id)
        guest.type(data)

    async def resize(self, size: ConsoleSize) -> None:
        self._instance.terminal.size = size

    async def close(self) -> None:
        self._closed = True
        if self._instance.console is self:
            self._instance.console = None
        self._instance.wake.set()


def figures_of(instance: FakeInstance, guest: Guest, *, now: float) -> dict[str, int]:
    """Made-up figures of one that runs, ``now`` in seconds: its processor time goes on from the last ones."""
    spec = instance.record.assignment.spec
    last_at, last_ns = instance.used or (now - 1.0, 0)
    share = spec.cpu_millis / 1000 if guest.busy else _IDLE_SHARE
    cpu_ns = last_ns + max(round((now - last_at) * share * 1e9), 1)
    instance.used = (now, cpu_ns)
    return {
        "cpu_usage_ns": cpu_ns,
        "cpu_periods": 0,
        "cpu_throttled_periods": 0,
        "cpu_throttled_ns": 0,
        "memory_used_bytes": guest.memory_bytes,
        "memory_working_set_bytes": guest.memory_bytes,
        "memory_limit_bytes": spec.memory_mb * MIB,
        "oom_kills": 0,
        "pids": 1,
        "block_read_bytes": 0,
        "block_write_bytes": 0,
        "network_receive_bytes": 0,
        "network_transmit_bytes": 0,
    }


def observe(record: FakeRecord, *, now: datetime) -> Observation:
    """How it is."""
    status, reason, message = InstanceStatus.STOPPED, "", ""
    if record.running:
        status = InstanceStatus.PAUSED if record.paused else InstanceStatus.RUNNING
    elif record.suspended:
        reason, message = "SUSPENDED", "its memory is on disk: start it to go on from there"
    elif record.exit_code is not None:
        failed = not record.requested and record.exit_code != 0
        status = InstanceStatus.FAILED if failed else InstanceStatus.STOPPED
        if record.oom:
            reason = "OOM_KILLED"
            message = "it needed more than its memory limit and was killed: raise spec.memory_mb"
        elif record.exit_code > 128:
            reason, message = "KILLED", f"it was ended by signal {record.exit_code - 128}"
        else:
            reason, message = "EXITED", f"it ended with exit code {record.exit_code}"
    return Observation(
        instance_id=record.assignment.instance_id,
        generation=record.assignment.generation,
        epoch=record.assignment.epoch,
        status=status,
        observed_at=now,
        reason=reason,
        message=message,
        exit_code=record.exit_code,
        started_at=record.started_at,
        finished_at=record.finished_at,
        runtime="fake 1",
    )


def not_running(instance_id: str) -> FailedPrecondition:
    """The error for what needs a running instance."""
    return FailedPrecondition(
        f"instance {instance_id} does not run: start it first",
        reason="NOT_RUNNING",
        metadata={"instance": instance_id},
    )
