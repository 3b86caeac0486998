"""The specification of the sampler, and the oracle of its tests. See ``_sampler_c.pyi`` for the one in use.

An instance is in a slot. A sample reads the files of one, works out rates, and puts a record into the slot's ring.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from hypervisor.ext.stats_sampler import _parsers_py as parsers
from hypervisor.ext.stats_sampler._files import (
    DERIVED,
    INACTIVE_FILE,
    KINDS,
    VALUES,
    Format,
    Sources,
    open_files,
)
from hypervisor.ext.stats_sampler._record import COUNTERS, FIELD_INDEX, FIELDS, RATES, UNLIMITED, Record

__all__ = [
    "HISTORY_MAX",
    "MAX_FILE_BYTES",
    "NO_LIMIT",
    "STAGGER",
    "WHOLE_BYTES",
    "Sampler",
    "parse",
    "read_file",
]

MAX_FILE_BYTES = 65_536
"""Longest file that is parsed; the fields of a longer one are unknown."""

WHOLE_BYTES = 3_072
"""A read that gave fewer bytes, the last of them a line end, gave the whole file: the kernel hands out less than
almost a page only where the file ends. Saves the second read that would say so."""

HISTORY_MAX = 1 << 20
"""Longest ring."""

NO_LIMIT = UNLIMITED - (1 << 16)
"""A memory limit from here on is none: v2 says ``max``, v1 the largest multiple of the page size."""

STAGGER = 16
"""In so many steps of a slow period the slots read their slow files, so that not all do so in one sample."""

_USED = FIELD_INDEX["memory_used_bytes"]
_LIMIT = FIELD_INDEX["memory_limit_bytes"]
_RATES = tuple(
    (FIELD_INDEX[rate.counter], None if rate.over is None else FIELD_INDEX[rate.over], rate.scale)
    for rate in RATES
)


def read_file(fd: int) -> bytes | None:
    """The file from its beginning; None when it is longer than ``MAX_FILE_BYTES``. Raises OSError."""
    data = b""
    while len(data) <= MAX_FILE_BYTES:
        part = os.pread(fd, MAX_FILE_BYTES + 1 - len(data), len(data))
        data += part
        if not part or (len(data) < WHOLE_BYTES and data.endswith(b"\n")):
            return data
    return None


def parse(kind: int, data: bytes) -> tuple[int | None, ...]:
    """The values that the text of a file of a kind (an index in ``KINDS``) gives, in the order of its keys."""
    names = [key.name for key in KINDS[kind].keys]
    match KINDS[kind].format:
        case Format.NUMBER:
            return (parsers.parse_number(data),)
        case Format.KEYED:
            return parsers.parse_keyed(data, names)
        case Format.KEYED_FROM_ZERO:
            return tuple(value or 0 for value in parsers.parse_keyed(data, names))
        case Format.PRESSURE:
            return parsers.parse_pressure(data, names)
        case Format.NET_DEV:
            return parsers.parse_net_dev(data)


class _Rate:
    """The rate of a counter: None until there are two values, again None when it or what it is over went backwards."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._base: tuple[int, int, int] | None = None

    def update(self, at: int, value: int, over: int, *, scale: float, min_span: int) -> None:
        if self._base is None or at < self._base[0] or value < self._base[1] or over < self._base[2]:
            self.rate = None
        elif at - self._base[0] < min_span:
            return
        elif over == self._base[2]:
            self.rate = 0.0
        else:
            self.rate = float(value - self._base[1]) * scale / float(over - self._base[2])
        self._base = (at, value, over)


class _Instance:
    def __init__(self, serial: int, history: int) -> None:
        self.serial = serial
        self.ring: deque[Record] = deque(maxlen=history)
        self.sequence = 0
        self.files: list[tuple[int, int]] = []
        self.reset([])

    def reset(self, files: list[tuple[int, int]]) -> None:
        for _, fd in self.files:
            os.close(fd)
        self.files = files
        self.gone = False
        self.values: list[int | None] = [None] * VALUES
        self.rates = [_Rate() for _ in RATES]
        self.slow_at: int | None = None


class Sampler:
    """See ``_sampler_c.pyi``: the same names, the same behaviour."""

    def __init__(
        self, *, history: int = 128, slow_period_ns: int = 5_000_000_000, min_rate_span_ns: int = 50_000_000
    ) -> None:
        if not 1 <= history <= HISTORY_MAX:
            raise ValueError(f"history is from 1 to {HISTORY_MAX}")
        if not 0 <= slow_period_ns <= UNLIMITED or not 1 <= min_rate_span_ns <= UNLIMITED:
            raise ValueError("slow_period_ns is from 0, min_rate_span_ns from 1 to 2^63 - 1")
        self._history = history
        self._slow_period_ns = slow_period_ns
        self._min_span = min_rate_span_ns
        self._serial = 0
        self._instances: dict[int, _Instance] = {}
        self._closed = False
        self._lock = threading.Lock()
        """Held while one instance's files, values and ring are changed or read."""

    def add(self, sources: Sources | None = None) -> int:
        files = [] if sources is None else open_files(sources)
        if self._closed:
            for _, fd in files:
                os.close(fd)
            raise ValueError("the sampler is closed")
        self._serial += 1
        instance = _Instance(self._serial, self._history)
        instance.reset(files)
        self._instances[self._serial] = instance
        return self._serial

    def reopen(self, slot: int, sources: Sources | None = None) -> None:
        instance = self._instances[slot]
        files = [] if sources is None else open_files(sources)
        with self._lock:
            instance.reset(files)

    def remove(self, slot: int) -> None:
        with self._lock:
            self._instances.pop(slot).reset([])

    def close(self) -> None:
        self._closed = True
        with self._lock:
            while self._instances:
                self._instances.popitem()[1].reset([])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._instances)

    def slots(self) -> list[int]:
        return sorted(self._instances)

    def gone(self) -> list[int]:
        return sorted(one.serial for one in list(self._instances.values()) if one.gone)

    def open_files(self) -> int:
        return sum(len(instance.files) for instance in list(self._instances.values()))

    def sample(self, slot: int, now_monotonic_ns: int, now_wall_ns: int, *, everything: bool = False) -> bool:
        _check_times(now_monotonic_ns, now_wall_ns)
        return self._sample(self._instances[slot], now_monotonic_ns, now_wall_ns, everything=everything)

    def sample_all(self, now_monotonic_ns: int, now_wall_ns: int) -> int:
        _check_times(now_monotonic_ns, now_wall_ns)
        return self.sample_some(self.slots(), now_monotonic_ns, now_wall_ns)

    def sample_some(
        self, slots: Iterable[int], now_monotonic_ns: int, now_wall_ns: int, *, everything: bool = False
    ) -> int:
        _check_times(now_monotonic_ns, now_wall_ns)
        found = [self._instances[slot] for slot in slots if slot in self._instances]
        return sum(
            self._sample(instance, now_monotonic_ns, now_wall_ns, everything=everything) for instance in found
        )

    def store(self, slot: int, now_monotonic_ns: int, now_wall_ns: int, values: Mapping[str, int]) -> None:
        _check_times(now_monotonic_ns, now_wall_ns)
        instance = self._instances[slot]
        if instance.files:
            raise ValueError(f"slot {slot} has files of its own")
        fresh: list[int | None] = [None] * VALUES
        for name, value in values.items():
            if name not in COUNTERS:
                raise ValueError(f"{name} is not a field that can be handed in")
            if not 0 <= value <= UNLIMITED:
                raise ValueError(f"{name} must be from 0 to 2^63 - 1")
            fresh[FIELD_INDEX[name]] = value
        with self._lock:
            instance.values = fresh
            self._finish(instance, now_monotonic_ns, now_wall_ns, set(range(VALUES)))

    def latest(self, slot: int) -> Record | None:
        ring = self._instances[slot].ring
        with self._lock:
            return ring[-1] if ring else None

    def history(
        self, slot: int, *, after_sequence: int = 0, since_monotonic_ns: int = 0, limit: int | None = None
    ) -> list[Record]:
        ring = self._instances[slot].ring
        with self._lock:
            records = list(ring)
        found = [
            record
            for record in records
            if record.sequence > after_sequence and record.monotonic_ns >= since_monotonic_ns
        ]
        return found if limit is None else found[max(0, len(found) - max(0, limit)) :]

    def select(self, fields: Sequence[str]) -> list[tuple[int | float | None, ...]]:
        for name in fields:
            if name not in Record._fields:
                raise ValueError(f"a record has no field {name}")
        rows: list[tuple[int | float | None, ...]] = []
        for slot, instance in sorted(self._instances.items()):
            with self._lock:
                record = instance.ring[-1] if instance.ring else None
            if record is not None:
                rows.append((slot, *(getattr(record, name) for name in fields)))
        return rows

    def totals(self, fields: Sequence[str]) -> tuple[int | float | None, ...]:
        for name in fields:
            if name not in FIELDS:
                raise ValueError(f"there is no field {name} to add up")
        sums: list[int | float | None] = [None] * len(fields)
        for instance in list(self._instances.values()):
            if instance.gone or not instance.ring:
                continue
            for position, name in enumerate(fields):
                value: int | float | None = getattr(instance.ring[-1], name)
                if value is not None:
                    total = (sums[position] or 0) + value
                    sums[position] = total if isinstance(total, float) else min(UNLIMITED, total)
        return tuple(sums)

    def _sample(self, instance: _Instance, at: int, wall: int, *, everything: bool) -> bool:
        with self._lock:
            return self._sample_locked(instance, at, wall, everything=everything)

    def _sample_locked(self, instance: _Instance, at: int, wall: int, *, everything: bool) -> bool:
        if not instance.files:
            return False
        slow = everything or instance.slow_at is None or at >= instance.slow_at
        fresh: set[int] = set()
        for kind, fd in instance.files:
            if KINDS[kind].slow and not slow:
                continue
            values: tuple[int | None, ...] = (None,) * len(KINDS[kind].keys)
            try:
                data = read_file(fd)
                if data is not None:
                    values = parse(kind, data)
            except OSError as error:
                if error.errno == errno.ENODEV and KINDS[kind].vital:
                    # Files of a control group that is gone can never be read again.
                    instance.reset([])
                    instance.gone = True
                    return False
            for key, value in zip(KINDS[kind].keys, values, strict=True):
                instance.values[key.value] = None if value is None else min(UNLIMITED, value * key.scale)
                fresh.add(key.value)
        if slow:
            period = self._slow_period_ns
            first = instance.slow_at is None
            instance.slow_at = at + (period * (instance.serial % STAGGER + 1) // STAGGER if first else period)
        used, inactive = instance.values[_USED], instance.values[INACTIVE_FILE]
        instance.values[DERIVED] = None if used is None or inactive is None else max(0, used - inactive)
        limit = instance.values[_LIMIT]
        if limit is not None and limit >= NO_LIMIT:
            instance.values[_LIMIT] = None
        self._finish(instance, at, wall, fresh)
        return True

    def _finish(self, instance: _Instance, at: int, wall: int, fresh: set[int]) -> None:
        """Work out the rates of what was read anew, and put the record into the ring."""
        rates: list[float | None] = []
        for rate, (counter, over, scale) in zip(instance.rates, _RATES, strict=True):
            value = instance.values[counter]
            divisor = at if over is None else instance.values[over]
            if value is None or divisor is None:
                rates.append(None)
                continue
            if counter in fresh:
                rate.update(at, value, divisor, scale=scale, min_span=self._min_span)
            rates.append(rate.rate)
        instance.sequence += 1
        fields = [*instance.values[: len(COUNTERS)], *rates]
        known = sum(1 << index for index in range(len(FIELDS)) if fields[index] is not None)
        instance.ring.append(Record._make([instance.sequence, at, wall, known, *fields]))


def _check_times(monotonic_ns: int, wall_ns: int) -> None:
    if not 0 <= monotonic_ns <= UNLIMITED or not 0 <= wall_ns <= UNLIMITED:
        raise ValueError("times are nanoseconds from 0 to 2^63 - 1")
