"""Which files an instance's figures are read from, how each is read, and opening them. Shared by sampler and twin."""

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

from hypervisor.ext.stats_sampler._record import COUNTERS, FIELD_INDEX

__all__ = [
    "DERIVED",
    "INACTIVE_FILE",
    "KINDS",
    "VALUES",
    "FileKind",
    "Format",
    "Key",
    "Sources",
    "open_files",
]

_Path = str | os.PathLike[str]

INACTIVE_FILE: Final = len(COUNTERS)
"""Index of a value that is read for the working set alone and is in no record."""

VALUES: Final = len(COUNTERS) + 1
"""How many values the files of an instance give: one for each of ``COUNTERS``, and ``INACTIVE_FILE``."""

DERIVED: Final = FIELD_INDEX["memory_working_set_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where an instance's figures are. What is not given, or does not exist, leaves its fields unknown."""

    cgroup2: _Path | None = None
    """Directory of the control group, version 2. Beside ``cgroup1`` (a hybrid) only its pressure is read."""
    cgroup1: Mapping[str, _Path] = field(default_factory=dict)
    """Directories of the control group, version 1, by controller: cpuacct, cpu, memory, blkio, pids."""
    net_dev: _Path | None = None
    """``/proc/PID/net/dev`` of a process in the network namespace, which lives as long as the file is open."""
    tap: _Path | None = None
    """``/sys/class/net/NAME/statistics`` of the tap the instance is behind. Its directions are turned round: what the
    host sends into the tap the instance receives."""


class Format(IntEnum):
    """How a file is parsed; each has a function of that name in ``_parsers_py``."""

    NUMBER = 0
    KEYED = 1
    KEYED_FROM_ZERO = 2
    """As KEYED, but a key that is not there counts as 0."""
    PRESSURE = 3
    NET_DEV = 4


class Key(NamedTuple):
    """One value of a file: ``value`` is the index of where it goes, ``scale`` what it is multiplied by."""

    name: bytes
    value: int
    scale: int


@dataclass(frozen=True, slots=True)
class FileKind:
    """One kind of file: a ``slow`` one is read once a slow period; ENODEV from a ``vital`` one: the group is gone."""

    format: Format
    keys: tuple[Key, ...]
    slow: bool = False
    vital: bool = True


def _key(name: bytes, target: str, scale: int = 1) -> Key:
    return Key(name, FIELD_INDEX[target], scale)


def _number(target: str, *, slow: bool = False, vital: bool = True) -> FileKind:
    return FileKind(Format.NUMBER, (_key(b"", target),), slow, vital)


def _pressure(some: str, full: str | None) -> FileKind:
    keys = [_key(b"some", some, 1000)] + ([_key(b"full", full, 1000)] if full else [])
    return FileKind(Format.PRESSURE, tuple(keys), slow=True)


_THROTTLED = (_key(b"nr_periods", "cpu_periods"), _key(b"nr_throttled", "cpu_throttled_periods"))
_OOM_KILLS = FileKind(Format.KEYED, (_key(b"oom_kill", "oom_kills"),), slow=True)

_V2: Final = {
    "cpu.stat": FileKind(
        Format.KEYED,
        (
            _key(b"usage_usec", "cpu_usage_ns", 1000),
            *_THROTTLED,
            _key(b"throttled_usec", "cpu_throttled_ns", 1000),
        ),
    ),
    "memory.current": _number("memory_used_bytes"),
    "memory.max": _number("memory_limit_bytes", slow=True),
    "memory.stat": FileKind(
        Format.KEYED,
        (
            _key(b"anon", "memory_anon_bytes"),
            _key(b"file", "memory_file_bytes"),
            _key(b"pgmajfault", "major_faults"),
            Key(b"inactive_file", INACTIVE_FILE, 1),
        ),
        slow=True,
    ),
    "memory.swap.current": _number("memory_swap_bytes", slow=True),
    "memory.events": _OOM_KILLS,
    "io.stat": FileKind(
        Format.KEYED_FROM_ZERO,
        (
            _key(b"rbytes", "block_read_bytes"),
            _key(b"wbytes", "block_write_bytes"),
            _key(b"rios", "block_read_ops"),
            _key(b"wios", "block_write_ops"),
        ),
    ),
    "pids.current": _number("pids"),
}
_PRESSURE: Final = {
    "cpu.pressure": _pressure("cpu_pressure_some_ns", None),
    "memory.pressure": _pressure("memory_pressure_some_ns", "memory_pressure_full_ns"),
    "io.pressure": _pressure("io_pressure_some_ns", "io_pressure_full_ns"),
}
_BLKIO: Final = FileKind(
    Format.KEYED_FROM_ZERO, (_key(b"Read", "block_read_bytes"), _key(b"Write", "block_write_bytes"))
)
_V1: Final = {
    ("cpuacct", "cpuacct.usage"): _number("cpu_usage_ns"),
    ("cpu", "cpu.stat"): FileKind(Format.KEYED, (*_THROTTLED, _key(b"throttled_time", "cpu_throttled_ns"))),
    ("memory", "memory.usage_in_bytes"): _number("memory_used_bytes"),
    ("memory", "memory.limit_in_bytes"): _number("memory_limit_bytes", slow=True),
    ("memory", "memory.stat"): FileKind(
        Format.KEYED,
        (
            _key(b"total_rss", "memory_anon_bytes"),
            _key(b"total_cache", "memory_file_bytes"),
            _key(b"total_swap", "memory_swap_bytes"),
            _key(b"total_pgmajfault", "major_faults"),
            Key(b"total_inactive_file", INACTIVE_FILE, 1),
        ),
        slow=True,
    ),
    ("memory", "memory.oom_control"): _OOM_KILLS,
    ("blkio", "blkio.throttle.io_service_bytes"): _BLKIO,
    ("pids", "pids.current"): _number("pids"),
}
_NET_DEV: Final = FileKind(
    Format.NET_DEV,
    (
        _key(b"", "network_receive_bytes"),
        _key(b"", "network_receive_packets"),
        _key(b"", "network_transmit_bytes"),
        _key(b"", "network_transmit_packets"),
    ),
    vital=False,
)
_TAP: Final = {
    "tx_bytes": _number("network_receive_bytes", vital=False),
    "rx_bytes": _number("network_transmit_bytes", vital=False),
    "tx_packets": _number("network_receive_packets", vital=False),
    "rx_packets": _number("network_transmit_packets", vital=False),
}

KINDS: Final = (*_V2.values(), *_PRESSURE.values(), *_V1.values(), _NET_DEV, *_TAP.values())
"""Every kind of file; what is open is named by its index here."""

_ABSENT: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESRCH, errno.EINVAL, errno.EOPNOTSUPP}
)
"""What opening says of a file that is not there, of a group or process just gone, of pressure that is not kept."""


def _wanted(sources: Sources) -> Iterator[tuple[str, FileKind]]:
    if sources.cgroup2 is not None:
        names = _PRESSURE if sources.cgroup1 else _V2 | _PRESSURE
        for name, kind in names.items():
            yield os.path.join(sources.cgroup2, name), kind
    for (controller, name), kind in _V1.items():
        directory = sources.cgroup1.get(controller)
        if directory is not None:
            yield os.path.join(directory, name), kind
    if sources.net_dev is not None:
        yield os.fspath(sources.net_dev), _NET_DEV
    if sources.tap is not None:
        for name, kind in _TAP.items():
            yield os.path.join(sources.tap, name), kind


def open_files(sources: Sources) -> list[tuple[int, int]]:
    """Open what there is of the sources: pairs of (index in ``KINDS``, descriptor), which the caller closes.

    Raises FileNotFoundError when a control group was asked for and none of its files exists, ValueError when both
    ``net_dev`` and ``tap`` are given, and OSError when a file exists and cannot be opened; nothing stays open then.
    """
    if sources.net_dev is not None and sources.tap is not None:
        raise ValueError("an instance's network is read from net_dev or from a tap, not from both")
    opened: list[tuple[int, int]] = []
    asked = found = False
    try:
        for path, kind in _wanted(sources):
            asked |= kind.vital
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                continue
            found |= kind.vital
            opened.append((KINDS.index(kind), fd))
        if asked and not found:
            where = sources.cgroup2 or next(iter(sources.cgroup1.values()))
            raise FileNotFoundError(errno.ENOENT, "no file of the control group exists", os.fspath(where))
    except BaseException:
        for _, fd in opened:
            os.close(fd)
        raise
    return opened
