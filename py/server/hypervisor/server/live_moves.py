"""Taking instances to another node with their memory: what a move of strategy LIVE asks of drivers, as a Protocol.

A virtual machine is migrated while it runs; a microVM is put to rest for the moment in which its snapshot is taken
along. The rest of a move (records, reservations, the switch, what is left behind) is nothing that this has to do with.
"""

from typing import Protocol

from hypervisor.core.errors import Unimplemented
from hypervisor.core.model import Instance, Node, Observation
from hypervisor.core.states import InstanceType
from hypervisor.server.agents import Agent, CallContext

__all__ = ["LiveMoves", "NoLiveMoves"]


class LiveMoves(Protocol):
    """What takes the memory of running instances along."""

    def why_not(self, instance: Instance, source: Node | None) -> str:
        """Why the instance cannot be moved so, in half a sentence; empty where it can. Called often: from memory."""
        ...

    async def move(
        self, instance: Instance, copy: Instance, source: Agent, target: Agent, context: CallContext
    ) -> Observation:
        """Bring ``instance``, which runs on ``source``, to ``target`` as ``copy``: the same in another epoch.

        Returns how the copy is there; the source runs it no more then. Idempotent: a call that broke off is made
        again, by another server too, and finds what is done already. Whatever it raises, the instance goes on running
        on ``source``; what is left on ``target`` is deleted by the caller. Cancelling it is the same.
        """
        ...


class NoLiveMoves:
    """No driver of this version can. Implements ``LiveMoves``."""

    def why_not(self, instance: Instance, source: Node | None) -> str:
        if instance.type is InstanceType.CONTAINER:
            return "containers cannot be moved while they run: use replace"
        return f"no driver of this version takes the memory of a running {instance.type.value} along"

    async def move(
        self, instance: Instance, copy: Instance, source: Agent, target: Agent, context: CallContext
    ) -> Observation:
        raise Unimplemented(
            f"instance {instance.name} cannot be moved live: {self.why_not(instance, None)}",
            reason="LIVE_MOVE_UNAVAILABLE",
            metadata={"instance_id": instance.id},
        )
