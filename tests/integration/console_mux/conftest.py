"""Both multiplexers, and what a test does with one: guests on pipes and ptys, viewers that read until a condition."""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hypervisor.ext.console_mux import _mux_py

IMPLEMENTATIONS = ["python"] if os.environ.get("HYPERVISOR_EXT_PURE") == "1" else ["python", "native"]
LIMIT_S = 20.0


def _make(kind: str) -> Any:
    if kind == "python":
        return _mux_py.ConsoleMux
    from hypervisor.ext.console_mux import _mux_c

    return _mux_c.ConsoleMux


class Rig:
    """A multiplexer, and the descriptors of the test that go with it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.before = set(os.listdir("/proc/self/fd"))
        self.mux = _make(kind)()
        self.mine: list[socket.socket] = []

    def viewer(self, console: int, **options: Any) -> tuple[socket.socket, int]:
        """A viewer's end of its connection, and the id of the viewer."""
        ours, theirs = socket.socketpair()
        ours.settimeout(LIMIT_S)
        self.mine.append(ours)
        attached = self.mux.attach_viewer(console, theirs.fileno(), **options)
        theirs.detach()
        return ours, attached.viewer

    def guest(self, console: int) -> socket.socket:
        """The guest's end of a console on a unix socket."""
        ours, theirs = socket.socketpair()
        ours.settimeout(LIMIT_S)
        self.mine.append(ours)
        self.mux.attach_guest(console, theirs.fileno(), theirs.fileno())
        theirs.detach()
        return ours

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for a condition, with a limit."""
        end = time.monotonic() + LIMIT_S
        while not true():
            assert time.monotonic() < end, "never came true"
            select.select([], [], [], 0.002)

    def event(self, kind: int) -> Any:
        """The next event of a kind; those before are dropped."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            select.select([self.mux.event_fd], [], [], 1)
            for event in self.mux.drain_events():
                if event.kind == kind:
                    return event
        raise AssertionError(f"no event {kind}")

    def close(self) -> None:
        self.mux.close()
        for end in self.mine:
            end.close()


@pytest.fixture(params=IMPLEMENTATIONS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param)
    try:
        yield made
    finally:
        made.close()
    assert set(os.listdir("/proc/self/fd")) <= made.before, "a descriptor was left open"
