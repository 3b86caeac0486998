"""What a viewer of a console, or a reader of its log, asks for."""

from dataclasses import dataclass
from datetime import datetime

from hypervisor.core.model import ConsoleSize

__all__ = [
    "ALL_KEPT",
    "MAX_WINDOW_BYTES",
    "ConsoleOptions",
    "FromPosition",
    "FromTime",
    "LastBytes",
    "LastLines",
    "LogOptions",
    "LogPiece",
    "Since",
    "Start",
]

MAX_WINDOW_BYTES = 16 << 20
"""The most output that a viewer can have granted and not yet taken."""


@dataclass(frozen=True, slots=True)
class LastBytes:
    """The last so many bytes; negative: all that are kept."""

    count: int


@dataclass(frozen=True, slots=True)
class LastLines:
    """The last so many lines."""

    count: int


@dataclass(frozen=True, slots=True)
class Since:
    """What was printed in the last ``seconds`` seconds, by the node's clock."""

    seconds: float


@dataclass(frozen=True, slots=True)
class FromTime:
    """What was printed at this time and later, by the node's clock."""

    time: datetime


@dataclass(frozen=True, slots=True)
class FromPosition:
    """What follows the first ``position`` bytes that the console printed in its life."""

    position: int


Start = LastBytes | LastLines | Since | FromTime | FromPosition
"""Where output begins."""

ALL_KEPT = LastBytes(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleOptions:
    """How to attach to a console; see ConsoleInput.Open in instance.proto.

    ``size``: of the viewer's terminal. ``fixed_size``: it stays while the viewer is attached. ``window_bytes``: output
    that may be on its way before credit is granted; 0: the viewer grants none, the transport holds output back.
    """

    read_only: bool = False
    replay: Start = LastBytes(0)
    size: ConsoleSize | None = None
    fixed_size: bool = False
    window_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """Which part of a console's log to read, and whether to go on with what comes."""

    start: Start = ALL_KEPT
    follow: bool = False


@dataclass(frozen=True, slots=True)
class LogPiece:
    """Bytes of a log from ``position`` on, at most 64 KiB; ``skipped`` bytes before them are left out."""

    position: int
    data: bytes
    skipped: int = 0
