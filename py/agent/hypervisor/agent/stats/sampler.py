"""One instance's use, sampled from its control group and its network namespace.

Files of the control group are opened once and read in place (``pread``), which costs a tenth of opening them each time.
Closing or removing the control group is never held up by the open files.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hypervisor.agent.stats.cgroups import CgroupPaths
from hypervisor.agent.stats.rates import Rate
from hypervisor.core.clock import Clock
from hypervisor.core.model import InstanceStats
from hypervisor.ext.stats_sampler import UNLIMITED, read_counters

__all__ = ["CgroupSampler", "network_bytes", "read_oom_kills"]

_Wanted = Mapping[str, tuple[bytes, ...]]

_V1_IO = "blkio.throttle.io_service_bytes"

# The name b"" is the number a file begins with.
_V1_FILES: Mapping[str, _Wanted] = {
    "cpuacct": {"cpuacct.usage": (b"",)},
    "cpu": {"cpu.stat": (b"nr_throttled",)},
    "memory": {
        "memory.usage_in_bytes": (b"",),
        "memory.limit_in_bytes": (b"",),
        "memory.stat": (b"total_inactive_file",),
        "memory.oom_control": (b"oom_kill",),
    },
    "blkio": {_V1_IO: (b"Read", b"Write")},
    "pids": {"pids.current": (b"",)},
}
_V2_FILES: _Wanted = {
    "cpu.stat": (b"usage_usec", b"nr_throttled"),
    "memory.current": (b"",),
    "memory.max": (b"",),
    "memory.stat": (b"inactive_file",),
    "memory.events": (b"oom_kill",),
    "io.stat": (b"rbytes", b"wbytes"),
    "pids.current": (b"",),
}

# No limit reads as "max" in v2 (UNLIMITED) and as the largest multiple of the page size below 2^63 in v1.
_NO_LIMIT = UNLIMITED - (1 << 16)


def _files(paths: CgroupPaths) -> dict[str, tuple[Path, tuple[bytes, ...]]]:
    if paths.unified is not None:
        return {name: (paths.unified / name, names) for name, names in _V2_FILES.items()}
    return {
        name: (directory / name, names)
        for controller, directory in paths.controllers.items()
        for name, names in _V1_FILES.get(controller, {}).items()
    }


def read_oom_kills(paths: CgroupPaths) -> int | None:
    """How many processes of the control group the kernel killed for lack of memory; None when it is gone."""
    files = _files(paths)
    path, names = files.get("memory.events") or files.get("memory.oom_control") or (None, ())
    if path is None:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return read_counters(fd, names)[0]
    except OSError:
        return None
    finally:
        os.close(fd)


def network_bytes(text: str) -> tuple[int, int]:
    """Bytes received and sent, from a ``/proc/PID/net/dev``: the sum over all interfaces but loopback."""
    received = sent = 0
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        columns = rest.split()
        if name.strip() != "lo" and len(columns) >= 9:
            received += int(columns[0])
            sent += int(columns[8])
    return received, sent


class CgroupSampler:
    """Keeps the control group's files open; :meth:`sample` reads them, :meth:`close` lets go."""

    def __init__(self, paths: CgroupPaths, *, pid: int, proc_root: Path) -> None:
        self._open: dict[str, tuple[int, tuple[bytes, ...]]] = {}
        for name, (path, names) in _files(paths).items():
            # A controller that is not enabled has no files: its numbers are then unknown.
            with suppress(FileNotFoundError):
                self._open[name] = (os.open(path, os.O_RDONLY | os.O_CLOEXEC), names)
        self._network = proc_root / str(pid) / "net" / "dev"
        self._cpu_rate = Rate()

    def close(self) -> None:
        """Close the files. Idempotent."""
        while self._open:
            _, (fd, _) = self._open.popitem()
            os.close(fd)

    def sample(self, clock: Clock) -> InstanceStats:
        """Read everything now. Takes some tens of microseconds; raises OSError when the control group is gone."""
        sampled_at, monotonic_s = clock.now(), clock.monotonic()
        values: dict[tuple[str, bytes], int] = {}
        for file, (fd, names) in self._open.items():
            for name, value in zip(names, read_counters(fd, names), strict=True):
                if value is not None:
                    values[file, name] = value

        def first(*places: tuple[str, bytes]) -> int | None:
            return next((values[place] for place in places if place in values), None)

        cpu_ns = first(("cpuacct.usage", b""))
        usage_us = first(("cpu.stat", b"usage_usec"))
        if usage_us is not None:
            cpu_ns = usage_us * 1000
        rate = None if cpu_ns is None else self._cpu_rate.update(monotonic_s, cpu_ns)
        used = first(("memory.current", b""), ("memory.usage_in_bytes", b""))
        droppable = first(("memory.stat", b"inactive_file"), ("memory.stat", b"total_inactive_file"))
        limit = first(("memory.max", b""), ("memory.limit_in_bytes", b""))
        read = first(("io.stat", b"rbytes"), (_V1_IO, b"Read"))
        written = first(("io.stat", b"wbytes"), (_V1_IO, b"Write"))
        # A group that has done no I/O has no line for any device.
        no_io = 0 if "io.stat" in self._open or _V1_IO in self._open else None
        received, sent = self._network_bytes()
        return InstanceStats(
            sampled_at=sampled_at,
            cpu_usage_ns=cpu_ns,
            cpu_used_cores=None if rate is None else rate / 1e9,
            cpu_throttled_periods=first(("cpu.stat", b"nr_throttled")),
            memory_used_bytes=used,
            memory_working_set_bytes=None if used is None else max(0, used - (droppable or 0)),
            memory_limit_bytes=None if limit is None or limit >= _NO_LIMIT else limit,
            oom_kills=first(("memory.events", b"oom_kill"), ("memory.oom_control", b"oom_kill")),
            pids=first(("pids.current", b"")),
            block_read_bytes=no_io if read is None else read,
            block_write_bytes=no_io if written is None else written,
            network_receive_bytes=received,
            network_transmit_bytes=sent,
        )

    def _network_bytes(self) -> tuple[int | None, int | None]:
        try:
            return network_bytes(self._network.read_text("ascii"))
        except OSError:
            return None, None
