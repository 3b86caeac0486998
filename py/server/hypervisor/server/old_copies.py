"""Deleting what is left of an instance on a node that it was moved off while the node was lost."""

import asyncio
import random
from collections.abc import Iterable

import structlog
from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import Instance, Observation
from hypervisor.core.retry import Backoff
from hypervisor.core.states import NodeStatus
from hypervisor.server import keys
from hypervisor.server.agents import Agents, CallContext
from hypervisor.server.committer import GroupCommitter

__all__ = ["OldCopies"]

_DELETE_S = 120.0
_TRIES = 8
_BACKOFF = Backoff(initial_s=0.2, maximum_s=30.0)

log = structlog.get_logger(__name__)


class OldCopies:
    """Told of what nodes report and should not have; deletes what was placed elsewhere since, and nothing else.

    What it does not get done, because this server ends or the node goes, is told again with the node's next
    registration.
    """

    def __init__(
        self, committer: GroupCommitter, agents: Agents, clock: Clock, *, rng: random.Random
    ) -> None:
        self._committer = committer
        self._agents = agents
        self._clock = clock
        self._rng = rng
        self._group: asyncio.TaskGroup | None = None
        self._at_work: set[tuple[str, str, int]] = set()

    async def run(self) -> None:
        """Delete what is found, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None

    def found(self, node_id: str, seen: Iterable[Observation]) -> None:
        """The node reported these, and should not have them."""
        for one in seen:
            key = (node_id, one.instance_id, one.epoch)
            if self._group is None or key in self._at_work or self._superseded(node_id, one) is None:
                continue
            self._at_work.add(key)
            self._group.create_task(self._delete(node_id, one, key), name=f"old-copy-{one.instance_id}")

    def _superseded(self, node_id: str, seen: Observation) -> Instance | None:
        """The instance as it is to be named to the node that has the old copy; None where that is none."""
        found = self._committer.find(keys.instance(seen.instance_id))
        if found is None or found.value.node_id == node_id or found.value.epoch <= seen.epoch:
            return None
        if found.value.move is not None:
            return None  # whoever moves it removes what is left of it
        return structs.replace(found.value, node_id=node_id, epoch=seen.epoch, generation=seen.generation)

    async def _delete(self, node_id: str, seen: Observation, key: tuple[str, str, int]) -> None:
        try:
            delays = _BACKOFF.delays(self._rng)
            for _ in range(_TRIES):
                node = self._committer.find(keys.node(node_id))
                copy = self._superseded(node_id, seen)
                if node is None or copy is None or node.value.status is NodeStatus.OFFLINE:
                    return
                context = CallContext(f"old-copy-{seen.instance_id}", _DELETE_S)
                try:
                    await self._agents.agent(node.value).delete(copy, context, grace_s=0.0)
                except HypervisorError as exc:
                    log.warning(
                        "old_copy_not_deleted",
                        instance_id=seen.instance_id,
                        node_id=node_id,
                        epoch=seen.epoch,
                        reason=exc.reason,
                        error=str(exc),
                    )
                else:
                    log.info(
                        "old_copy_deleted", instance_id=seen.instance_id, node_id=node_id, epoch=seen.epoch
                    )
                    return
                await self._clock.sleep(next(delays))
        except Exception:
            log.exception("old_copy_not_deleted", instance_id=seen.instance_id, node_id=node_id)
        finally:
            self._at_work.discard(key)
