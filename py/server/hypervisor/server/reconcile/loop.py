"""Carries out what ``decide`` says, on the elected leader only, every commit fenced."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import OperationRecord
from hypervisor.server import keys
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.drafts import Decision, Draft
from hypervisor.server.executor import OperationExecutor
from hypervisor.server.images.deleting import finish_for_another
from hypervisor.server.node_changes import mark_offline, mark_unknown
from hypervisor.server.reconcile.decide import (
    Action,
    FinishImageDelete,
    InspectNode,
    MarkNodeOffline,
    MarkUnknown,
    PurgeOperation,
    RedriveOperation,
    RemoveLeftover,
    RemoveOldCopy,
    Situation,
    decide,
)
from hypervisor.server.reconcile.history import HistoryKeeper
from hypervisor.server.reconcile.loss_keeper import LossKeeper
from hypervisor.server.reconcile.node_loop import NodeReconciler, NodeReconcilerSettings
from hypervisor.server.services import ClusterChange, Kind, Versioned
from hypervisor.server.store.storage import Compare, Election, Storage
from hypervisor.server.view import StoreView

__all__ = ["Duty", "Reconciler", "ReconcilerSettings"]

Duty = Callable[[Compare], Coroutine[Any, Any, None]]
"""Work that goes on while this server leads, and is cancelled when it does no longer; every commit with the fence."""

_PARALLEL = 64

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ReconcilerSettings:
    """Times in seconds. ``retention_s``: how long ended operations are kept; ``history_s``: how far back events can
    be resumed."""

    interval_s: float = 1.0
    retention_s: float = 86_400.0
    patience_s: float = 60.0
    leader_ttl_s: float = 10.0
    retry_s: float = 1.0
    history_s: float = 3600.0
    history_interval_s: float = 60.0
    purge_interval_s: float = 60.0
    nodes: NodeReconcilerSettings = field(default_factory=NodeReconcilerSettings)


class Reconciler:
    """Stands for election, and does the leader's work while it leads."""

    def __init__(
        self,
        storage: Storage,
        view: StoreView,
        committer: GroupCommitter,
        executor: OperationExecutor,
        nodes: NodeReconciler,
        clock: Clock,
        *,
        server_id: str,
        settings: ReconcilerSettings | None = None,
        duties: Sequence[Duty] = (),
        losses: LossKeeper | None = None,
    ) -> None:
        self._storage = storage
        self._view = view
        self._committer = committer
        self._executor = executor
        self._nodes = nodes
        self._clock = clock
        self._server_id = server_id
        self._settings = settings or ReconcilerSettings()
        self._duties = tuple(duties)
        self._losses = losses
        self._changed = asyncio.Event()
        self._leading = False
        self._next_purge = clock.monotonic()
        view.add_listener(self._notice)

    @property
    def leading(self) -> bool:
        """Whether this server believes that it leads."""
        return self._leading

    async def run(self) -> None:
        """Stand for election until cancelled."""
        await self._view.loaded()
        while True:
            try:
                async with self._storage.election(
                    keys.LEADER_ELECTION, self._server_id, ttl_s=self._settings.leader_ttl_s
                ) as election:
                    while True:
                        leadership = await election.acquire()
                        log.info("leadership_acquired", server_id=self._server_id)
                        await self._lead_until_lost(election, leadership.fence)
                        log.warning("leadership_lost", server_id=self._server_id)
            except HypervisorError as exc:
                log.warning("election_failed", reason=exc.reason, error=str(exc))
                await self._clock.sleep(self._settings.retry_s)

    async def _lead_until_lost(self, election: Election, fence: Compare) -> None:
        losing = asyncio.create_task(election.lost(), name="leadership")
        leading = {asyncio.create_task(self._lead(fence), name="reconcile")}
        leading |= {asyncio.create_task(duty(fence), name="duty") for duty in self._duties}
        self._leading = True
        try:
            await asyncio.wait({losing, *leading}, return_when=asyncio.FIRST_COMPLETED)
            for task in leading:
                if task.done():
                    task.result()
        finally:
            self._leading = False
            for task in (losing, *leading):
                task.cancel()
            await asyncio.wait({losing, *leading})

    async def _lead(self, fence: Compare) -> None:
        await self._view.wait_revision(fence.mod_revision)
        self._nodes.forget()
        # Nodes are asked beside the loop: one that does not answer holds nothing up.
        async with asyncio.TaskGroup() as asking:
            await self._lead_on(fence, asking)

    async def _lead_on(self, fence: Compare, asking: asyncio.TaskGroup) -> None:
        history = HistoryKeeper(keep_s=self._settings.history_s, interval_s=self._settings.history_interval_s)
        while True:
            self._changed.clear()
            if not self._view.stale and not self._view.restoring:
                await self.step(fence)
                self._nodes.begin_due(asking, fence)
                await self._forget_history(history)
            try:
                async with asyncio.timeout(self._settings.interval_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
            # Changes come in swarms: look once for many.
            await self._clock.sleep(self._settings.interval_s / 10)

    async def step(self, fence: Compare) -> tuple[Action, ...]:
        """Look once, act once; returns what was decided."""
        actions = decide(self._situation())
        for start in range(0, len(actions), _PARALLEL):
            async with asyncio.TaskGroup() as group:
                for action in actions[start : start + _PARALLEL]:
                    group.create_task(self._act(action, fence))
        if self._losses is not None:
            await self._losses.step(fence)
        return actions

    async def _forget_history(self, history: HistoryKeeper) -> None:
        revision = history.forget_up_to(self._clock.monotonic(), self._view.revision)
        if revision is None:
            return
        try:
            await self._storage.compact(revision)
        except HypervisorError as exc:
            log.warning("compaction_failed", revision=revision, reason=exc.reason, error=str(exc))
        else:
            log.info("history_forgotten", before_revision=revision)

    def _situation(self) -> Situation:
        view = self._view
        nodes = [n.value for n in view.nodes()]
        return Situation(
            now=self._clock.now(),
            nodes=nodes,
            nodes_alive={n.id for n in nodes if view.node_alive(n.id)},
            instances=[i.value for i in view.instances()],
            operations=[o.value for o in self._operations_to_look_at()],
            servers_alive={s.id for s in view.servers()},
            retention=timedelta(seconds=self._settings.retention_s),
            patience=timedelta(seconds=self._settings.patience_s),
            images=[i.value for i in view.images()],
        )

    def _operations_to_look_at(self) -> Iterable[Versioned[OperationRecord]]:
        """Those that have not ended; now and then all of them, to find what is older than is kept."""
        if self._clock.monotonic() < self._next_purge:
            return self._view.unfinished_operations()
        self._next_purge = self._clock.monotonic() + self._settings.purge_interval_s
        return self._view.operations()

    async def _act(self, action: Action, fence: Compare) -> None:
        try:
            match action:
                case MarkNodeOffline(node_id):
                    if await self._commit(lambda d: mark_offline(d, node_id, fence=fence)):
                        log.warning("node_offline", node_id=node_id)
                case MarkUnknown(instance_id):
                    await self._commit(lambda d: mark_unknown(d, instance_id, fence=fence))
                case RedriveOperation(operation_id):
                    await self._executor.take_over(operation_id)
                case RemoveLeftover(instance_id):
                    self._executor.remove_leftover(instance_id)
                case RemoveOldCopy(instance_id):
                    self._executor.remove_old_copy(instance_id)
                case InspectNode(node_id):
                    self._nodes.ask(node_id)
                case PurgeOperation(operation_id):
                    await self._commit(lambda d: _purge(d, operation_id, fence=fence))
                case FinishImageDelete(image_id):
                    if await self._commit(
                        lambda d: finish_for_another(d, image_id, view=self._view, fence=fence)
                    ):
                        log.info("image_delete_finished", image_id=image_id)
        except HypervisorError as exc:
            # The next look decides anew.
            log.warning("reconcile_action_failed", action=repr(action), reason=exc.reason, error=str(exc))

    async def _commit(self, decision: Decision[bool]) -> bool:
        return (await self._committer.commit(decision)).value

    def _notice(self, changes: tuple[ClusterChange, ...]) -> None:
        # Instances and operations change all the time, and need the leader only when a node or server is lost.
        if any(change.kind is Kind.NODE for change in changes):
            self._changed.set()


def _purge(draft: Draft, operation_id: str, *, fence: Compare) -> bool:
    draft.guard(fence)
    found = draft.get(keys.operation(operation_id))
    if found is None or not found.value.done:
        return False
    draft.delete(keys.operation(operation_id))
    return True
