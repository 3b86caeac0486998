"""The native sampler; ``_sampler_py`` specifies it."""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, final

from hypervisor.ext.stats_sampler._files import Sources
from hypervisor.ext.stats_sampler._record import Record

MAX_FILE_BYTES: int

def parse(kind: int, data: bytes) -> tuple[int | None, ...]:
    """The values that a file of a kind (an index in ``KINDS``) gives, in the order of its keys; for tests.

    Raises IndexError for a kind that there is not.
    """

@final
class Sampler:
    """Many instances, each in a slot with its open files and a ring of its last ``history`` records.

    Files are opened when an instance is added and read in place afterwards. Reading, parsing, rates and the ring are
    done without the GIL and without allocating. Methods may be called from any thread: a sample of all slots holds up
    other methods by one instance at most. Times are the caller's: monotonic and wall clock in nanoseconds, 0 to 2^63-1.

    A record takes 8 bytes a field, some 330 in all; the ring is allocated when the slot is added.
    """

    def __init__(
        self, *, history: int = 128, slow_period_ns: int = 5_000_000_000, min_rate_span_ns: int = 50_000_000
    ) -> None:
        """
        ``history``: records kept of each slot, 1 to 2^20.
        ``slow_period_ns``: how often the slow files are read (memory.stat and memory limit, memory.events, pressure;
        see ``Record``); records between have the values read last. 0: with every sample. All are read with a slot's
        first sample; then the slots spread over the period.
        ``min_rate_span_ns``: a sample that follows sooner repeats the rates of the one before, as over so short a time
        they would be noise. At least 1.
        Raises ValueError for what is out of range.
        """

    def add(self, sources: Sources | None = None) -> int:
        """Open an instance's files and give it a slot, a number from 1 that is never used again.

        Without sources the slot has no files: it is passed over by samples, and gets its records by :meth:`store`.
        Raises FileNotFoundError when there is no file of the control group asked for, another OSError when one cannot
        be opened (EMFILE, EACCES), ValueError when the sampler is closed; nothing stays open then.
        """

    def reopen(self, slot: int, sources: Sources | None = None) -> None:
        """Replace a slot's files (the instance was started again): its history stays, its rates begin anew.

        Raises KeyError for a slot that there is not, and as :meth:`add`; the slot is as it was then.
        """

    def remove(self, slot: int) -> None:
        """Close a slot's files and forget its history. Raises KeyError for a slot that there is not."""

    def close(self) -> None:
        """Remove all slots; none can be added any more. Idempotent."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __len__(self) -> int:
        """How many slots there are."""

    def slots(self) -> list[int]:
        """The slots there are, in the order of their numbers."""

    def gone(self) -> list[int]:
        """Slots whose control group was found removed. Their files are closed, their history can be read still."""

    def open_files(self) -> int:
        """How many files are kept open."""

    def sample(self, slot: int, now_monotonic_ns: int, now_wall_ns: int, *, everything: bool = False) -> bool:
        """Read a slot's files and put a record into its ring; False when it has none or its control group is gone.

        ``everything`` reads the slow files although they may not be due. A file that cannot be read, is too long or
        does not hold what it should leaves its fields unknown in this record. Raises KeyError for a slot that there is
        not, ValueError for a time out of range.
        """

    def sample_all(self, now_monotonic_ns: int, now_wall_ns: int) -> int:
        """:meth:`sample` of every slot; returns how many records were stored. Raises ValueError as there."""

    def sample_some(
        self, slots: Iterable[int], now_monotonic_ns: int, now_wall_ns: int, *, everything: bool = False
    ) -> int:
        """:meth:`sample` of these slots, in one go; returns how many records were stored.

        Slots that there are not are passed over. Raises ValueError as there.
        """

    def store(self, slot: int, now_monotonic_ns: int, now_wall_ns: int, values: Mapping[str, int]) -> None:
        """Put a record into a slot's ring whose figures come from elsewhere (libvirt); rates are worked out as ever.

        ``values`` has numbers from 0 to 2^63-1 by the names of ``COUNTERS``; those left out are unknown. Raises
        KeyError for a slot that there is not, ValueError for one that has files, for a name or number that is not
        allowed; nothing is stored then.
        """

    def latest(self, slot: int) -> Record | None:
        """The newest record; None when there is none yet. Raises KeyError for a slot that there is not."""

    def history(
        self, slot: int, *, after_sequence: int = 0, since_monotonic_ns: int = 0, limit: int | None = None
    ) -> list[Record]:
        """Records still in the ring, oldest first: of larger sequence, not before a time, the newest ``limit``.

        Raises KeyError for a slot that there is not.
        """

    def select(self, fields: Sequence[str]) -> list[tuple[int | float | None, ...]]:
        """Of every slot's newest record these fields, in one go: rows of (slot, field, ...) in the order of the slots.

        Slots without a record are left out. ``fields`` are names of :class:`Record`; another one raises ValueError.
        """

    def totals(self, fields: Sequence[str]) -> tuple[int | float | None, ...]:
        """Sums of these fields over the newest records of all slots but those that are gone; None where none knows it.

        Sums of whole numbers stop at 2^63-1. ``fields`` are names of ``FIELDS``; another one raises ValueError.
        """
