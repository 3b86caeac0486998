"""Processes, told apart by number and start time, since numbers are used again."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessId", "children_of", "command_line", "every_process", "identify", "terminate"]

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process: its number, and when it started in clock ticks since boot."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        return identify(self.pid) == self


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on (state, parent, ...)."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def identify(pid: int) -> ProcessId | None:
    """The process that has this number now; None when there is none, or only its remains."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else ProcessId(pid, int(fields[19]))


def every_process() -> Iterator[ProcessId]:
    """All processes that can be seen."""
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (found := identify(int(entry.name))) is not None:
            yield found


def command_line(process: ProcessId) -> tuple[str, ...]:
    """Its arguments; empty when it is gone or a kernel thread."""
    try:
        data = (_PROC / str(process.pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ()
    return tuple(part.decode(errors="replace") for part in data.split(b"\0")[:-1])


def children_of(process: ProcessId) -> list[ProcessId]:
    """Its direct children."""
    return [
        p for p in every_process() if (fields := _stat(p.pid)) is not None and int(fields[1]) == process.pid
    ]


def _signal(process: ProcessId, number: signal.Signals) -> None:
    if process.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def terminate(
    processes: Iterable[ProcessId],
    *,
    grace_s: float,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> list[ProcessId]:
    """SIGTERM, and SIGKILL after the grace period (at once where it is 0); returns those that live on even so."""
    wanted = list(processes)
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        if number is signal.SIGTERM and grace_s <= 0:
            continue
        for process in wanted:
            _signal(process, number)
        end = monotonic() + patience_s
        while wanted and monotonic() < end:
            wanted = [process for process in wanted if process.alive()]
            if wanted:
                sleep(0.05)
        if not wanted:
            break
    return wanted
