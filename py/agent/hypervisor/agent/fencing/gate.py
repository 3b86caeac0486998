"""What every start of an instance asks first."""

from typing import Protocol

from hypervisor.agent.entries import Entry

__all__ = ["Gate", "OpenGate"]


class Gate(Protocol):
    """What starts ask."""

    @property
    def closed(self) -> bool:
        """Whether what has to be stopped must not run now."""
        ...

    def check(self, entry: Entry) -> None:
        """Unavailable (``NODE_FENCED``) where this instance must not be started now."""
        ...

    async def protect(self, instance_id: str) -> None:
        """An instance that has to be stopped is about to be made."""
        ...


class OpenGate:
    """Everything may run."""

    closed = False

    def check(self, entry: Entry) -> None:
        """It may."""

    async def protect(self, instance_id: str) -> None:
        """Nothing to do."""
