"""The guest inside a fake instance: a terminal that echoes and a tiny line interpreter. Pure but for its listeners.

Words it knows: ``echo WORDS``, ``stty size``, ``exit [CODE]``, ``spew BYTES`` (prints that many), ``busy`` (uses all
its processors from now on), ``eat BYTES`` (uses memory; past the limit it is killed). ``sleep SECONDS`` is for an
instance's command only: it lives that long.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import ConsoleSize

__all__ = ["FakeTerminal", "Guest", "GuestEnd"]

_KEPT_BYTES = 1 << 20
_PROMPT = b"$ "
_OOM_EXIT = 137


@dataclass(frozen=True, slots=True)
class GuestEnd:
    """How a guest ended by itself."""

    exit_code: int
    oom: bool = False


class FakeTerminal:
    """Output waits here until it is read, up to 1 MiB; past that the oldest is lost (a guest never blocks)."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._waiting = bytearray()
        self._wake = wake
        self.size = ConsoleSize(80, 24)

    @property
    def unread(self) -> int:
        """Bytes that wait to be read."""
        return len(self._waiting)

    def emit(self, data: bytes) -> None:
        """Print."""
        self._waiting += data
        if len(self._waiting) > _KEPT_BYTES:
            del self._waiting[: len(self._waiting) - _KEPT_BYTES]
        self._wake()

    def take(self, limit: int) -> bytes:
        """The oldest output, removed."""
        data = bytes(self._waiting[:limit])
        del self._waiting[:limit]
        return data


class Guest:
    """One run. ``ended`` is called once, when it ends by itself."""

    def __init__(
        self, terminal: FakeTerminal, *, memory_limit_bytes: int, ended: Callable[[GuestEnd], None]
    ) -> None:
        self._terminal = terminal
        self._memory_limit_bytes = memory_limit_bytes
        self._ended = ended
        self._line = bytearray()
        self.alive = True
        self.busy = False
        self._frozen = False
        self._held = bytearray()
        self.memory_bytes = min(8 << 20, memory_limit_bytes)

    def boot(self, command: tuple[str, ...]) -> float | None:
        """Run the instance's command, or the interpreter; seconds after which it ends by itself (None: it stays)."""
        if not command or command[0] in ("sh", "/bin/sh"):
            self._terminal.emit(b"fake guest ready\r\n" + _PROMPT)
            return None
        if command[0] == "sleep" and len(command) == 2 and command[1].replace(".", "", 1).isdigit():
            return float(command[1])
        if command[0] == "busy":
            self.busy = True
            return None
        self._run(" ".join(command))
        self.end(0)
        return None

    def type(self, data: bytes) -> None:
        """Typed bytes: echoed, and run line by line."""
        if not self.alive:
            raise FailedPrecondition("the instance has ended: start it again", reason="NOT_RUNNING")
        if self._frozen:
            self._held += data
            return
        for byte in data:
            if not self.alive:
                return
            self._key(byte)

    def freeze(self) -> None:
        """What is typed from now on waits."""
        self._frozen = True

    def thaw(self) -> None:
        """Go on, with what was typed meanwhile."""
        self._frozen, held, self._held = False, bytes(self._held), bytearray()
        if held and self.alive:
            self.type(held)

    def end(self, exit_code: int, *, oom: bool = False) -> None:
        """It ends by itself."""
        if self.alive:
            self.alive = False
            self._ended(GuestEnd(exit_code, oom))

    def _key(self, byte: int) -> None:
        if byte in (0x0A, 0x0D):
            self._terminal.emit(b"\r\n")
            line = self._line.decode("utf-8", "replace")
            self._line.clear()
            self._run(line)
            if self.alive:
                self._terminal.emit(_PROMPT)
        elif byte in (0x08, 0x7F):
            if self._line:
                del self._line[-1:]
                self._terminal.emit(b"\b \b")
        else:
            self._line.append(byte)
            self._terminal.emit(bytes((byte,)))

    def _run(self, line: str) -> None:
        words = line.split()
        match words:
            case []:
                return
            case ["echo", *rest]:
                self._print(" ".join(rest))
            case ["stty", "size"]:
                self._print(f"{self._terminal.size.height} {self._terminal.size.width}")
            case ["exit"]:
                self.end(0)
            case ["exit", code] if code.isdigit():
                self.end(int(code) % 256)
            case ["spew", count] if count.isdigit():
                self._terminal.emit((b"0123456789abcdef" * (int(count) // 16 + 1))[: int(count)])
            case ["busy"]:
                self.busy = True
            case ["eat", count] if count.isdigit():
                self._eat(int(count))
            case _:
                self._print(f"{words[0]}: not found")

    def _eat(self, count: int) -> None:
        self.memory_bytes = min(self.memory_bytes + count, self._memory_limit_bytes)
        if self.memory_bytes == self._memory_limit_bytes:
            self.end(_OOM_EXIT, oom=True)

    def _print(self, text: str) -> None:
        self._terminal.emit(text.encode() + b"\r\n")
