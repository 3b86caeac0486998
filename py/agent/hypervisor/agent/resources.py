"""What the node has and uses, read from /proc and the file system. Parsing is pure; reading is one blocking call."""

import asyncio
import os
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from hypervisor.core.errors import Internal
from hypervisor.core.model import NodeResources
from hypervisor.core.resources import Resources

__all__ = ["FixedResources", "MeasuredResources", "ResourceSource", "cpu_times", "memory_of"]

_log = structlog.get_logger(__name__)


class ResourceSource(Protocol):
    """Where a node's resources come from."""

    async def read(self) -> NodeResources:
        """What the node has and uses now; processor use is averaged since the read before."""
        ...


def cpu_times(stat: str) -> tuple[int, int]:
    """Busy and total ticks of all processors since boot, from the text of /proc/stat.

    Time given to guests is part of user time and not counted twice; waiting for disks is idle time, stolen time busy.
    """
    line = stat.partition("\n")[0].split()
    if len(line) < 5 or line[0] != "cpu":
        raise Internal("/proc/stat has no cpu line", reason="PROC_UNREADABLE")
    ticks = [int(text) for text in line[1:9]]
    total = sum(ticks)
    idle = ticks[3] + (ticks[4] if len(ticks) > 4 else 0)
    return total - idle, total


def memory_of(meminfo: str) -> tuple[int, int]:
    """Total and available bytes, from the text of /proc/meminfo."""
    found: dict[str, int] = {}
    for line in meminfo.splitlines():
        key, _, rest = line.partition(":")
        if key in ("MemTotal", "MemAvailable"):
            found[key] = int(rest.split()[0]) * 1024
    if len(found) != 2:
        raise Internal("/proc/meminfo lacks MemTotal or MemAvailable", reason="PROC_UNREADABLE")
    return found["MemTotal"], found["MemAvailable"]


class MeasuredResources:
    """The machine's own: processors this process may use, memory, and the file system that holds ``disk_path``."""

    def __init__(self, *, disk_path: Path, proc: Path = Path("/proc")) -> None:
        self._disk_path = disk_path
        self._proc = proc
        self._before: tuple[int, int] | None = None
        self._last: NodeResources | None = None

    async def read(self) -> NodeResources:
        """As measured now; as measured last while the system does not let itself be read (a heartbeat with old
        figures is better than none)."""
        try:
            self._last = await asyncio.to_thread(self._read)
        except OSError as exc:
            _log.warning("resources_unreadable", error=str(exc))
            if self._last is None:
                raise Internal(
                    f"the node's resources cannot be read: {exc}", reason="PROC_UNREADABLE"
                ) from exc
        return self._last

    def _read(self) -> NodeResources:
        busy, total = cpu_times((self._proc / "stat").read_text())
        processors = os.cpu_count() or 1
        busy_before, total_before = self._before or (0, 0)
        self._before = (busy, total)
        passed = total - total_before
        used_millis = round(1000 * processors * (busy - busy_before) / passed) if passed > 0 else 0
        memory, available = memory_of((self._proc / "meminfo").read_text())
        disk = os.statvfs(self._disk_path)
        return NodeResources(
            cpu_millis=processors * 1000,
            cpu_used_millis=min(max(used_millis, 0), processors * 1000),
            memory_bytes=memory,
            memory_used_bytes=max(memory - available, 0),
            disk_bytes=disk.f_blocks * disk.f_frsize,
            disk_used_bytes=(disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        )


class FixedResources:
    """A simulated node's: a made-up capacity of which nothing is in use."""

    def __init__(self, capacity: Resources) -> None:
        self._resources = NodeResources(
            cpu_millis=capacity.cpu_millis,
            memory_bytes=capacity.memory_bytes,
            disk_bytes=capacity.disk_bytes,
        )

    async def read(self) -> NodeResources:
        return msgspec.structs.replace(self._resources)
