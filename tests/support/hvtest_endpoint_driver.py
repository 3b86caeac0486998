"""A driver whose guests are ends that a test holds: their consoles are descriptors, and outlive the agent.

``python -m hvtest_endpoint_driver`` is the agent with this driver. All but the console is the fake driver's. What a
console is made of, its instance's labels say (``console``): ``fifos`` (the default: ``out`` and ``in``), ``pty`` (the
path of a terminal, which a link ``pty`` names), ``socket`` (a unix socket that something else listens at, ``socket``),
``pipes`` (of a process that the agent has started, which copies from ``out`` and to ``in``).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import cast

from hypervisor.agent.drivers import registry
from hypervisor.agent.drivers.driver import Assignment, Console, ConsoleEndpoint, Handle
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.core.errors import FailedPrecondition, Unimplemented
from hypervisor.core.model import ConsoleSize, Observation
from hypervisor.core.states import InstanceType

__all__ = ["NAME", "EndpointDriver"]

NAME = "endpoints"


_PUMP = "exec 3<&0; cat <&3 > in & exec cat out"


class _Endpoint:
    """One of the kinds, in a directory. ``pipes``: the ends of the process's, where this agent has started it."""

    def __init__(self, directory: Path, kind: str, pipes: tuple[int, int] | None) -> None:
        self._directory = directory
        self._kind = kind
        self._pipes = pipes
        self._open: tuple[int, ...] = ()

    @property
    def resizable(self) -> bool:
        return self._kind == "pty"

    def endpoint(self) -> ConsoleEndpoint:
        self._close()
        match self._kind:
            case "pty":
                fd = os.open(self._directory / "pty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._open = (fd,)
                return ConsoleEndpoint(output=fd, input=fd, terminal=True)
            case "socket":
                # By a descriptor: its path is longer than an address of a socket may be.
                directory = os.open(self._directory, os.O_PATH)
                with socket.socket(socket.AF_UNIX) as sock:
                    try:
                        sock.connect(f"/proc/self/fd/{directory}/socket")
                    except OSError as exc:
                        raise FailedPrecondition(f"nobody is there: {exc}", reason="CONSOLE_GONE") from exc
                    finally:
                        os.close(directory)
                    fd = sock.detach()
                self._open = (fd,)
                return ConsoleEndpoint(output=fd, input=fd)
            case "pipes":
                if self._pipes is None:
                    raise FailedPrecondition("its pipes went with an agent", reason="CONSOLE_GONE")
                return ConsoleEndpoint(output=self._pipes[0], input=self._pipes[1])
            case _:
                out = os.open(self._directory / "out", os.O_RDONLY | os.O_NONBLOCK)
                typed = os.open(self._directory / "in", os.O_RDWR | os.O_NONBLOCK)
                self._open = (out, typed)
                return ConsoleEndpoint(output=out, input=typed)

    async def read(self, limit: int = 65536) -> bytes:
        raise AssertionError("the agent reads a console that it could hand over")

    async def write(self, data: bytes) -> None:
        raise AssertionError("the agent writes to a console that it could hand over")

    async def resize(self, size: ConsoleSize) -> None:
        raise Unimplemented("it has no size", reason="CAPABILITY_MISSING")

    async def close(self) -> None:
        self._close()

    def _close(self) -> None:
        for fd in self._open:
            os.close(fd)
        self._open = ()


class EndpointDriver(FakeDriver):
    """The fake driver with such consoles, below ``guests`` (beside the agent's data directory)."""

    def __init__(self, guests: Path, context: registry.DriverContext) -> None:
        super().__init__(FakeConfig(state_dir=context.data_dir / "fake"), clock=context.clock)
        self._guests = guests
        self._pipes: dict[str, tuple[int, int]] = {}

    async def create(self, assignment: Assignment) -> Handle:
        directory = self._guests / assignment.instance_id
        directory.mkdir(exist_ok=True)
        (directory / "kind").write_text(assignment.labels.get("console", "fifos"))
        return await super().create(assignment)

    async def start(self, instance_id: str) -> Observation:
        directory = self._guests / instance_id
        directory.mkdir(exist_ok=True)
        for name in ("out", "in"):
            if not (directory / name).exists():
                os.mkfifo(directory / name)
        if self._kind(instance_id) == "pipes" and instance_id not in self._pipes:
            self._pipes[instance_id] = self._start_process(directory)
        return await super().start(instance_id)

    async def attach(self, instance_id: str) -> Console:  # type: ignore[override]  # another console than the fake's
        await self.get(instance_id)
        return _Endpoint(self._guests / instance_id, self._kind(instance_id), self._pipes.get(instance_id))

    def _kind(self, instance_id: str) -> str:
        return (self._guests / instance_id / "kind").read_text()

    @staticmethod
    def _start_process(directory: Path) -> tuple[int, int]:
        """The process, which outlives the agent as a VMM does; our ends of its output and input."""
        typed, their_in = os.pipe()
        their_out, printed = os.pipe()
        subprocess.Popen(
            ["sh", "-c", _PUMP], cwd=directory, stdin=typed, stdout=printed, start_new_session=True
        )
        os.close(typed)
        os.close(printed)
        return their_out, their_in


def _make(context: registry.DriverContext) -> EndpointDriver:
    return EndpointDriver(context.data_dir.parent / "guests", context)


def main() -> None:
    """Run the agent."""
    table = cast("dict[str, registry.DriverFactory]", registry.DRIVERS)
    table[NAME] = registry.DriverFactory(NAME, (InstanceType.CONTAINER,), _make)
    from hypervisor.agent.__main__ import main as agent

    sys.exit(agent(prog_name="hypervisor-agent"))


if __name__ == "__main__":
    main()
