"""The values that go in and out of the multiplexer, and its limits. The same for both implementations."""

from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "COALESCE_MS",
    "INPUT_QUEUE_BYTES",
    "MAX_SCROLLBACK_BYTES",
    "MIN_SCROLLBACK_BYTES",
    "SCROLLBACK_BYTES",
    "VIEWER_MEMORY_BYTES",
    "Attached",
    "Chunk",
    "ConsoleStats",
    "Event",
    "EventKind",
    "ViewerEnd",
    "ViewerStats",
]

SCROLLBACK_BYTES = 256 << 10
"""Default size of a console's ring."""

MIN_SCROLLBACK_BYTES = 16
MAX_SCROLLBACK_BYTES = 64 << 20

INPUT_QUEUE_BYTES = 64 << 10
"""What a console keeps of typed bytes that its guest has not taken. More is refused."""

COALESCE_MS = 2
"""Output that follows other output within this time is gathered, to at most 64 KiB, before viewers get it. The first
output after a pause is never held back."""

VIEWER_MEMORY_BYTES = 96 << 10
"""No viewer, however slow or hostile, takes more memory than this besides its socket's buffer in the kernel. One that
keeps up takes less than 1 KiB."""


class EventKind(IntEnum):
    """What happened. Events of one kind about one object that were not drained yet are one event, the newest."""

    GUEST_GONE = 1
    """The guest's output ended (``value`` 0) or failed (``value`` is the errno); its descriptors are closed. The
    console, its scrollback and its viewers stay. The end of a terminal (EIO of a pty) counts as an end, 0."""
    VIEWER_GONE = 2
    """A viewer's socket is closed; ``value`` is a :class:`ViewerEnd`."""
    RESIZED = 3
    """A viewer asked for ``rows`` x ``columns``. Where the guest is a terminal that is its size now."""
    INPUT_READY = 4
    """:meth:`ConsoleMux.write` did not accept all of a write before; now there is room."""
    INPUT_CLOSED = 5
    """The guest takes no more input (``value`` is the errno); what was queued is gone."""
    LOG_FULL = 6
    """The log file has reached its limit; ``value`` is its size. Said once for each :meth:`ConsoleMux.set_log`."""
    LOG_FAILED = 7
    """The log file could not be written (``value`` is the errno) and is closed. The next one goes on from there."""


class ViewerEnd(IntEnum):
    """Why a viewer went."""

    CLOSED = 0
    """It closed or lost its connection."""
    ENDED = 1
    """It got all output and the end, after :meth:`ConsoleMux.end_viewers`."""
    PROTOCOL_ERROR = 2
    """It sent what is no frame."""


class Event(NamedTuple):
    """Something the owner may want to know. ``viewer`` is 0 where the event is the console's."""

    kind: EventKind
    console: int
    viewer: int
    value: int
    rows: int
    columns: int


class Attached(NamedTuple):
    """A new viewer: it will see the output from ``position`` on; ``end - position`` bytes of it are replay."""

    viewer: int
    position: int
    end: int


class Chunk(NamedTuple):
    """Output read from a ring: ``data`` begins ``skipped`` bytes after the position asked for and ends at
    ``position``."""

    data: bytes
    skipped: int
    position: int


class ConsoleStats(NamedTuple):
    """One console, in bytes unless said otherwise."""

    start: int
    """Position of the oldest byte still in the ring."""
    end: int
    """Position after the newest byte: all output ever."""
    attached: bool
    """Whether there is a guest."""
    viewers: int
    """Viewers now."""
    skipped: int
    """Output that viewers, present and past, were not given, summed up."""
    input_bytes: int
    """Typed bytes that guests took."""
    input_queued: int
    """Typed bytes that the guest has not taken yet."""
    log_position: int
    """Position up to which the log file was written (or skipped)."""
    log_bytes: int
    """Size of the current log file, as far as the mux knows: what :meth:`ConsoleMux.set_log` said and was written."""
    log_skipped: int
    """Output that never came into a log since the disk, or its absence, was slower than the ring."""


class ViewerStats(NamedTuple):
    """One viewer, in bytes."""

    console: int
    position: int
    """Position of the next byte of output that it gets."""
    skipped: int
    """Output that it was not given, as it was too slow."""
    sent: int
    """What its socket took: output and what goes around it."""
    credit: int
    """Output that it may still get; -1 without a limit."""
    memory_bytes: int
    """Memory it takes now, besides its socket's buffer in the kernel: at most ``VIEWER_MEMORY_BYTES``."""
