"""A driver whose guests are FIFOs that a test writes to: their consoles are descriptors, and outlive the agent.

``python -m hvtest_endpoint_driver`` is the agent with this driver. All but the console is the fake driver's.
"""

import os
import sys
from pathlib import Path
from typing import cast

from hypervisor.agent.drivers import registry
from hypervisor.agent.drivers.driver import Console, ConsoleEndpoint
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.core.errors import Unimplemented
from hypervisor.core.model import ConsoleSize, Observation
from hypervisor.core.states import InstanceType

__all__ = ["NAME", "EndpointDriver"]

NAME = "endpoints"


class _Endpoint:
    """Two FIFOs, ``out`` and ``in``, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._out = os.open(directory / "out", os.O_RDONLY | os.O_NONBLOCK)
        self._in = os.open(directory / "in", os.O_RDWR | os.O_NONBLOCK)
        self._closed = False

    @property
    def resizable(self) -> bool:
        return False

    def endpoint(self) -> ConsoleEndpoint:
        return ConsoleEndpoint(output=self._out, input=self._in)

    async def read(self, limit: int = 65536) -> bytes:
        raise AssertionError("the agent reads a console that it could hand over")

    async def write(self, data: bytes) -> None:
        raise AssertionError("the agent writes to a console that it could hand over")

    async def resize(self, size: ConsoleSize) -> None:
        raise Unimplemented("it is a FIFO", reason="CAPABILITY_MISSING")

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._out)
            os.close(self._in)


class EndpointDriver(FakeDriver):
    """The fake driver with FIFOs for consoles, below ``guests`` (beside the agent's data directory)."""

    def __init__(self, guests: Path, context: registry.DriverContext) -> None:
        super().__init__(FakeConfig(state_dir=context.data_dir / "fake"), clock=context.clock)
        self._guests = guests

    async def start(self, instance_id: str) -> Observation:
        directory = self._guests / instance_id
        directory.mkdir(exist_ok=True)
        for name in ("out", "in"):
            if not (directory / name).exists():
                os.mkfifo(directory / name)
        return await super().start(instance_id)

    async def attach(self, instance_id: str) -> Console:  # type: ignore[override]  # another console than the fake's
        await self.get(instance_id)
        return _Endpoint(self._guests / instance_id)


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
