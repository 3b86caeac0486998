"""The native multiplexer does what its twin does: the same guests, viewers, keys, sizes and logs give the same bytes,
markers, cursors and events."""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.ext.console_mux import _mux_py
from hypervisor.ext.console_mux.frames import encode, encode_credit, encode_input, encode_resize

pytestmark = pytest.mark.skipif(
    os.environ.get("HYPERVISOR_EXT_PURE") == "1",
    reason="HYPERVISOR_EXT_PURE=1: the compiled module is not used",
)
LIMIT_S = 20.0
CAPACITY = 6000


class Step(NamedTuple):
    """One thing that happens; what the numbers mean is the verb's to say."""

    verb: str
    one: int = 0
    two: int = 0
    flag: bool = False


STEPS = st.lists(
    st.one_of(
        st.builds(Step, st.just("print"), st.integers(2000, 4000)),
        st.builds(Step, st.just("print"), st.integers(1, 4000)),
        st.builds(Step, st.just("attach"), st.integers(-1, 9000), st.integers(-1, 9000), st.booleans()),
        st.builds(Step, st.just("look"), st.integers(0, 3), st.integers(0, 7000), st.booleans()),
        st.builds(Step, st.just("grant"), st.integers(0, 3), st.integers(1, 6000)),
        st.builds(Step, st.just("type"), st.integers(0, 3), st.integers(0, 60)),
        st.builds(Step, st.just("resize"), st.integers(0, 3), st.integers(1, 300)),
        st.builds(Step, st.just("babble"), st.integers(0, 3)),
        st.builds(Step, st.just("take"), st.integers(0, 3), st.integers(1, 9000)),
        st.builds(Step, st.just("detach"), st.integers(0, 3)),
        st.builds(Step, st.just("end"), st.integers(0, 300)),
        st.builds(Step, st.just("guest"), flag=st.booleans()),
        st.builds(Step, st.just("log")),
    ),
    min_size=3,
    max_size=25,
)


class World:
    """One multiplexer with one console, and everybody around it."""

    def __init__(self, make: Callable[..., Any], directory: str) -> None:
        # Nothing is gathered: how output is cut into frames then depends on nothing but the steps.
        self.mux = make(coalesce_ms=0)
        self.console = self.mux.create_console(scrollback_bytes=CAPACITY, position=50, history=b"before")
        self.directory = directory
        self.printed = 0
        self.guest: socket.socket | None = None
        self.viewers: list[tuple[socket.socket, int]] = []
        self.seen: list[bytes] = []
        self.typed = b""
        self.logs = 0
        self.trace: list[object] = []
        self._pulse, theirs = socket.socketpair()
        self._other = self.mux.create_console()
        self.mux.attach_guest(self._other, theirs.detach())
        self._beats = 0

    def run(self, steps: list[Step]) -> list[object]:
        self._guest(Step("guest"))
        self._attach(Step("attach", 0, -1, True))
        for step in steps:
            getattr(self, f"_{step.verb}")(step)
            self._settle()
            self._note()
        for at in range(len(self.viewers)):
            before = -1
            while len(self.seen[at]) > before:
                before = len(self.seen[at])
                self._take(Step("take", at, 1 << 20))
                self._settle()
        self._note()
        self.mux.close()
        for sock, _ in self.viewers:
            self._receive(sock, 1 << 20)
            sock.close()
        for end in (self.guest, self._pulse):
            if end is not None:
                end.close()
        logs = [open(f"{self.directory}/{at}", "rb").read() for at in range(self.logs)]  # noqa: SIM115
        return [*self.trace, self.seen, self.typed, logs]

    def _print(self, step: Step) -> None:
        if self.guest is not None:
            data = bytes((self.printed + at) % 251 for at in range(step.one))
            self.printed += step.one
            self.guest.sendall(data)

    def _attach(self, step: Step) -> None:
        self._view(step, position=step.one, credit=step.two, framed=True, may_resize=step.flag)

    def _look(self, step: Step) -> None:
        self._view(step, replay_bytes=step.two, framed=step.flag, read_only=True)

    def _view(self, step: Step, **options: Any) -> None:
        if len(self.viewers) == 4:
            return
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        # Little room, so that one that takes nothing soon has it full.
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        attached = self.mux.attach_viewer(self.console, theirs.detach(), **options)
        self.viewers.append((ours, attached.viewer))
        self.seen.append(b"")
        self.trace.append(("attached", attached.position, attached.end))

    def _grant(self, step: Step) -> None:
        self._say(step.one, encode_credit(step.two))

    def _type(self, step: Step) -> None:
        self._say(step.one, encode_input(b"k" * step.two))

    def _resize(self, step: Step) -> None:
        self._say(step.one, encode_resize(step.two, step.two + 1))

    def _babble(self, step: Step) -> None:
        self._say(step.one, b"\xff" + encode(16)[1:])  # type: ignore[arg-type]

    def _say(self, at: int, data: bytes) -> None:
        if at < len(self.viewers):
            try:
                self.viewers[at][0].send(data)
            except (BlockingIOError, BrokenPipeError):
                self.trace.append(("unsaid", at))

    def _take(self, step: Step) -> None:
        if step.one < len(self.viewers):
            data = self._receive(self.viewers[step.one][0], step.two)
            self.seen[step.one] += data

    @staticmethod
    def _receive(sock: socket.socket, count: int) -> bytes:
        try:
            return sock.recv(count)
        except (BlockingIOError, ConnectionResetError):
            return b""

    def _detach(self, step: Step) -> None:
        if step.one < len(self.viewers):
            try:
                self.mux.detach_viewer(self.viewers[step.one][1])
            except KeyError:
                self.trace.append("was gone")

    def _end(self, step: Step) -> None:
        self.mux.end_viewers(self.console, step.one)

    def _guest(self, step: Step) -> None:
        if self.guest is not None:
            self.guest.close()
            self.guest = None
            self._settle()
        if not step.flag:
            self.guest, theirs = socket.socketpair()
            self.guest.setblocking(False)
            fd = theirs.detach()
            self.mux.attach_guest(self.console, fd, fd)

    def _log(self, _: Step) -> None:
        fd = os.open(f"{self.directory}/{self.logs}", os.O_CREAT | os.O_WRONLY, 0o600)
        self.logs += 1
        self.mux.set_log(self.console, fd)

    def _settle(self) -> None:
        """Return when everything that was there to be done has been done."""
        before: object = None
        end = time.monotonic() + LIMIT_S
        while (now := self._state()) != before or not self._is_logged():
            assert time.monotonic() < end, "it never settles"
            before = now
            # What was ready before this is served before it.
            for _ in range(3):
                self._beats += 1
                self._pulse.send(b".")
                while self.mux.stats(self._other).end < self._beats:
                    assert time.monotonic() < end, "it does not answer"
                    time.sleep(0)
        if self.guest is not None:
            self.typed += self._receive(self.guest, 1 << 16)

    def _is_logged(self) -> bool:
        stats = self.mux.stats(self.console)
        return self.logs == 0 or stats.log_position == stats.end

    def _note(self) -> None:
        kinds = [(e.kind, e.value, e.rows, e.columns) for e in self.mux.drain_events()]
        self.trace.append((self._state(), sorted(kinds)))

    def _state(self) -> list[object]:
        stats = self.mux.stats(self.console)
        found: list[object] = [(stats.start, stats.end, stats.attached, stats.viewers, stats.skipped)]
        for _, viewer in self.viewers:
            try:
                one = self.mux.viewer_stats(viewer)
            except KeyError:
                found.append(None)
            else:
                found.append((one.position, one.skipped, one.sent, one.credit))
        return found


def _run(make: Callable[..., Any], steps: list[Step]) -> list[object]:
    with tempfile.TemporaryDirectory() as directory:
        return World(make, directory).run(steps)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_the_native_multiplexer_does_what_its_twin_does(steps: list[Step]) -> None:
    from hypervisor.ext.console_mux import _mux_c

    assert _run(_mux_c.ConsoleMux, steps) == _run(_mux_py.ConsoleMux, steps)
