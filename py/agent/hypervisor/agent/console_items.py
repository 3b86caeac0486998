"""What a viewer of a console sees."""

from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Data", "End", "Ended", "Notice", "Output", "Skipped"]


class End(StrEnum):
    """Why a console ended for a viewer; see ConsoleOutput.Closed in instance.proto."""

    EXITED = "EXITED"
    DELETED = "DELETED"
    DETACHED = "DETACHED"


@dataclass(frozen=True, slots=True)
class Data:
    """Output of the instance from ``position`` on; how much at most is its viewer's to say."""

    data: bytes | memoryview
    position: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Skipped:
    """The viewer was too slow and lost this many bytes."""

    count: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about the console; see ConsoleOutput.Notice."""

    reason: str
    message: str
    position: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The console ended; nothing follows."""

    reason: End
    exit_code: int | None = None


Output = Data | Skipped | Notice | Ended
