"""What a console holder holds, over the real multiplexer and real files; without a connection."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvtest_agent_waiting import until
from hypervisor.agent.console_holder import protocol
from hypervisor.agent.console_holder.holding import Holding, Refused

SECOND = 1_000_000_000


@dataclass
class Held:
    """A holding, its clock and its events."""

    directory: Path
    now_ns: int = 1_000 * SECOND
    events: list[protocol.Event] = field(default_factory=list)
    holding: Holding = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A new holder on the same files."""
        self.holding = Holding(
            self.directory,
            now_ns=lambda: self.now_ns,
            emit=self.events.append,
            on_start=lambda _: None,
        )

    def ask(self, request: protocol.Request, *descriptors: int) -> object:
        """The result; descriptors are duplicated."""
        return self.holding.handle(request, tuple(os.dup(fd) for fd in descriptors))

    def open(
        self, name: str = "i-1", *, files: int = 3, position: int = 0, size: int = 4096
    ) -> protocol.ConsoleState:
        """Open a console."""
        state = self.ask(protocol.Open(name, 4096, size, files, position))
        assert isinstance(state, protocol.ConsoleState)
        return state

    def read(self, position: int) -> protocol.ReadReply:
        """From there on."""
        reply = self.ask(protocol.Read("i-1", position, 65536))
        assert isinstance(reply, protocol.ReadReply)
        return reply

    async def printed(self, end: int) -> None:
        """Wait until so much was printed."""

        def there() -> bool:
            self.holding.drain()
            return self.open().end >= end

        await until(there, what=f"{end} bytes are printed")

    async def on_disk(self, end: int) -> None:
        """Wait until so much is in the log."""

        def there() -> bool:
            self.holding.drain()
            files = sorted((self.directory / "i-1").glob("[0-9]*.log"))
            return bool(files) and int(files[-1].stem) + files[-1].stat().st_size >= end

        await until(there, what=f"{end} bytes are on disk")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path)
    yield made
    made.holding.close()


@pytest.fixture
def guest(held: Held) -> Iterator[Callable[[bytes], None]]:
    ours, theirs = socket.socketpair()
    held.open()
    held.ask(protocol.Attach("i-1", "run 1", True), theirs.fileno())
    theirs.close()
    yield ours.sendall
    ours.close()


async def test_positions_and_scrollback_go_on_in_the_next_holder(
    held: Held, guest: Callable[[bytes], None]
) -> None:
    guest(b"before ")
    await held.on_disk(7)
    held.holding.close()
    held.start()

    state = held.open()

    assert (state.start, state.end, state.live, state.run) == (0, 7, False, "")
    assert held.read(0).data == b"before "


async def test_a_console_without_a_log_begins_where_its_agent_knows_it_was(held: Held) -> None:
    state = held.open(files=0, position=5000)

    assert (state.start, state.end) == (5000, 5000)
    assert not list(held.directory.glob("*/*.log"))


async def test_output_beyond_the_scrollback_is_read_from_the_log(
    held: Held, guest: Callable[[bytes], None]
) -> None:
    text = b"".join(b"line %04d\n" % n for n in range(1000))
    for at in range(0, len(text), 2000):
        guest(text[at : at + 2000])
        await held.on_disk(min(at + 2000, len(text)))

    state, shown = held.open(), b""
    position = state.start
    while position < state.end:
        reply = held.read(position)
        assert reply.position == position
        shown += reply.data
        position += len(reply.data)

    assert shown == text
    assert state.ring_start > state.start
    assert len(list((held.directory / "i-1").glob("[0-9]*.log"))) == 2


@pytest.mark.parametrize(("lines", "expected"), [(0, b""), (1, b"line 0999\n"), (400, None), (5000, None)])
async def test_the_last_lines_are_found(
    held: Held, guest: Callable[[bytes], None], lines: int, expected: bytes | None
) -> None:
    text = b"".join(b"line %04d\n" % n for n in range(1000))
    for at in range(0, len(text), 2000):
        guest(text[at : at + 2000])
        await held.on_disk(min(at + 2000, len(text)))

    found = held.ask(protocol.Locate("i-1", -1, lines))

    assert isinstance(found, protocol.LocateReply)
    assert found.position == len(text) - min(lines, 1000) * 10
    if expected is not None:
        assert held.read(found.position).data == expected


async def test_a_line_without_its_end_is_a_line(held: Held, guest: Callable[[bytes], None]) -> None:
    guest(b"one\ntwo\nthr")
    await held.printed(11)

    found = held.ask(protocol.Locate("i-1", -1, 2))

    assert isinstance(found, protocol.LocateReply)
    assert held.read(found.position).data == b"two\nthr"


async def test_output_is_found_by_its_time(held: Held, guest: Callable[[bytes], None]) -> None:
    for number in range(5):
        guest(b"x" * 100)
        await held.printed(100 * (number + 1))
        held.holding.tick()
        held.now_ns += 10 * SECOND

    found = held.ask(protocol.Locate("i-1", 1_025 * SECOND, -1))
    before = held.ask(protocol.Locate("i-1", 1 * SECOND, -1))

    assert found == protocol.LocateReply(300)
    assert before == protocol.LocateReply(0)


async def test_the_end_of_a_guest_is_told_with_its_position(held: Held) -> None:
    ours, theirs = socket.socketpair()
    held.open()
    held.ask(protocol.Attach("i-1", "run 1", True), theirs.fileno())
    theirs.close()
    ours.sendall(b"bye")
    ours.close()

    def told() -> bool:
        held.holding.drain()
        return bool(held.events)

    await until(told, what="the end is told")
    assert held.events == [protocol.RunEnded("i-1", "run 1", 3)]
    assert held.holding.live == 0


async def test_a_log_that_cannot_be_written_is_told_and_tried_again(
    held: Held, guest: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest(b"x" * 2000)
    await held.on_disk(2000)
    real = os.open

    def full(path: object, flags: int, *more: int, **named: int) -> int:
        if str(path).endswith("new.log"):
            raise OSError(28, "No space left on device")
        return real(path, flags, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    guest(b"y" * 3000)

    def failed() -> bool:
        held.holding.drain()
        return any(isinstance(event, protocol.LogFailed) for event in held.events)

    await until(failed, what="it is told")
    monkeypatch.undo()
    held.now_ns += 60 * SECOND
    held.holding.tick()
    guest(b"z" * 100)
    await held.on_disk(5100)

    assert held.read(0).data.startswith(b"x")
    assert held.open().end == 5100


def test_a_forgotten_console_leaves_nothing(held: Held) -> None:
    held.open()
    assert (held.directory / "i-1").is_dir()

    held.ask(protocol.Forget("i-1", 0))

    assert not (held.directory / "i-1").exists()
    assert held.holding.states() == ()
    held.ask(protocol.Forget("i-1", 0))


def test_logs_of_others_are_removed(held: Held) -> None:
    for name in ("i-1", "i-2"):
        held.open(name)
    (held.directory / "i-3").mkdir()

    held.ask(protocol.Retain(("i-2",)))

    assert [entry.name for entry in held.directory.iterdir()] == ["i-2"]


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "x" * 200, ".hidden", "a\0b"])
def test_a_name_that_could_leave_the_directory_is_refused(held: Held, name: str) -> None:
    with pytest.raises(Refused):
        held.open(name)
    held.ask(protocol.Forget(name, 0))


def test_a_refused_request_keeps_no_descriptor(held: Held) -> None:
    ours, theirs = socket.socketpair()
    with pytest.raises(Refused) as refused:
        held.ask(protocol.Attach("i-9", "run", True), theirs.fileno())
    theirs.close()

    assert refused.value.reason == "UNKNOWN_CONSOLE"
    assert ours.recv(1) == b"", "the other end is closed everywhere"
    ours.close()
