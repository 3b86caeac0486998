"""What commands print: answers on standard output, notes and progress on standard error."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO, TypeVar

from hypervisor.ctl.display.table import Column, cut, harmless, render
from hypervisor.ctl.invocation import Invocation

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from hypervisor.v1.operation_pb2 import Operation

__all__ = ["ProgressLine", "note", "now_s", "show_list", "show_one", "terminal_width", "write"]

M = TypeVar("M", bound="Message")


def now_s() -> float:
    """Seconds since the epoch, for ages."""
    return time.time()


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal behind the stream; None where it is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def write(text: str) -> None:
    """Print to standard output at once, so that a reader of a pipe sees it when it happens."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A sentence about what is going on, for a person."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show_list(
    invocation: Invocation,
    items: Sequence[M],
    columns: Callable[[], Sequence[Column[M]]],
    *,
    name: Callable[[M], str],
    empty: str,
) -> None:
    """Print objects in the form that was asked for. ``empty`` is said on a terminal when there are none."""
    if invocation.quiet:
        for item in items:
            write(name(item))
    elif invocation.output in ("json", "yaml"):
        write(_document(invocation, items))
    elif items or not sys.stdout.isatty():
        lines = render(
            columns(),
            items,
            wide=invocation.output == "wide",
            headers=invocation.headers,
            width=terminal_width(sys.stdout),
        )
        if lines:
            write("\n".join(lines))
    else:
        note(empty)


def show_one(invocation: Invocation, item: M, text: Callable[[], str], *, name: Callable[[M], str]) -> None:
    """Print one object: as text, or in the form that was asked for."""
    if invocation.quiet:
        write(name(item))
    elif invocation.output in ("json", "yaml"):
        write(_document(invocation, item))
    else:
        write(text())


def _document(invocation: Invocation, answer: "Message | Sequence[Message]") -> str:
    from hypervisor.ctl.display import documents

    return documents.as_json(answer) if invocation.output == "json" else documents.as_yaml(answer)


class ProgressLine:
    """One line on standard error that is written over while work goes on; nothing where that is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = False

    @classmethod
    def for_terminal(cls) -> "ProgressLine | None":
        """A line on standard error, or None where it is no terminal."""
        return cls(sys.stderr) if sys.stderr.isatty() else None

    def __call__(self, operation: "Operation") -> None:
        """Show how far an operation is."""
        what = harmless(operation.progress_message) or "working"
        self.say(f"{operation.verb} {operation.object_name}: {operation.progress_percent}% {what}")

    def say(self, text: str) -> None:
        """Show this in place of what is shown."""
        width = (terminal_width(self._stream) or 80) - 1
        self._stream.write("\r\x1b[K" + cut(harmless(text), width))
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Remove the line. Idempotent."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()
