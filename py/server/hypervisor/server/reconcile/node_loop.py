"""Asks nodes what they have, and carries out what ``instances.reconcile`` says. On the elected leader only.

A node is asked when its agent registers, when something on it is not known, after repairs, and else every
``interval_s``, each node at a time of its own. One that does not answer is asked less and less often until it does.
"""

import asyncio
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import Instance, Node, Observation, OperationRecord
from hypervisor.core.states import DesiredState, InstanceType, NodeStatus
from hypervisor.server import keys
from hypervisor.server.agents import Agents, CallContext
from hypervisor.server.committer import GroupCommitter, Lane
from hypervisor.server.drafts import Draft
from hypervisor.server.executor import OperationExecutor
from hypervisor.server.ledger import AllocationRules
from hypervisor.server.node_changes import fold_observation, mark_lost
from hypervisor.server.operations import OperationService
from hypervisor.server.reconcile.instances import (
    Adopt,
    CreateAgain,
    DeleteCopy,
    GiveSizes,
    KeepOrphan,
    MarkLost,
    NodeAction,
    NodeSituation,
    Start,
    Stop,
    TakeIn,
    reconcile,
)
from hypervisor.server.reconcile.recreating import (
    ADOPT,
    RECREATE,
    SYSTEM,
    begin_adopt,
    begin_create_again,
    unheld,
)
from hypervisor.server.resizing import SizeChange, begin_update
from hypervisor.server.services import Caller, ClusterChange, InstanceRef, Kind, Mutation
from hypervisor.server.store.storage import Compare, Storage
from hypervisor.server.verbs import VERBS, begin
from hypervisor.server.view import StoreView

__all__ = ["NodeReconciler", "NodeReconcilerSettings"]

_STOP_GRACE_S = 10.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeReconcilerSettings:
    """Times in seconds. ``again_s``: how soon a node is asked again where something is not settled; doubled, up to
    ``interval_s``, while that does not help. ``keep_older``: never delete an instance without a record that is older
    than the store or its last restore, as a lost record is the likelier cause."""

    interval_s: float = 60.0
    orphan_grace_s: float = 600.0
    keep_older: bool = True
    again_s: float = 1.0
    timeout_s: float = 10.0
    at_once: int = 32


@dataclass(slots=True)
class _Turn:
    """When a node is to be asked next, and what is known of it from the times before."""

    due_s: float
    again_s: float
    asked_s: float = float("-inf")
    asking: bool = False
    orphans: dict[str, float] = field(default_factory=dict)


class NodeReconciler:
    """See the module's docstring. ``watch`` runs while this server leads; turns are of one leadership."""

    def __init__(
        self,
        storage: Storage,
        view: StoreView,
        committer: GroupCommitter,
        executor: OperationExecutor,
        operations: OperationService,
        agents: Agents,
        clock: Clock,
        *,
        rules: AllocationRules,
        settings: NodeReconcilerSettings,
    ) -> None:
        self._storage = storage
        self._view = view
        self._committer = committer
        self._executor = executor
        self._operations = operations
        self._agents = agents
        self._clock = clock
        self._rules = rules
        self._settings = settings
        self._turns: dict[str, _Turn] = {}
        self._gate = asyncio.Semaphore(settings.at_once)
        view.add_listener(self._notice)

    @property
    def orphans(self) -> int:
        """Copies on nodes that no record tells of, or a wrong one; as far as this server, leading, has seen."""
        return sum(len(turn.orphans) for turn in self._turns.values())

    def forget(self) -> None:
        """Another leadership begins: what was seen before may be long ago."""
        self._turns.clear()

    def ask(self, node_id: str) -> None:
        """Something on the node is not known: ask it soon."""
        turn = self._turn(node_id)
        turn.due_s = min(turn.due_s, turn.asked_s + turn.again_s)

    def begin_due(self, group: asyncio.TaskGroup, fence: Compare) -> None:
        """Have those nodes asked whose turn it is, in tasks of the group."""
        now = self._clock.monotonic()
        for found in list(self._view.nodes()):
            node = found.value
            turn = self._turn(node.id)
            if node.status is not NodeStatus.OFFLINE and turn.due_s <= now and not turn.asking:
                turn.asking = True
                group.create_task(self._take_turn(node.id, turn, fence), name=f"reconcile-{node.id}")

    async def look(self, node_id: str, fence: Compare) -> tuple[NodeAction, ...]:
        """Ask the node, decide, act; returns what was decided. Raises what the agent answers."""
        found = self._committer.find(keys.node(node_id))
        if found is None or found.value.status is NodeStatus.OFFLINE:
            return ()
        node = found.value
        wanted = {i.value.id: i.value for i in self._view.instances_on(node_id)}
        context = CallContext(f"reconcile-{node_id}", self._settings.timeout_s)
        seen = {o.instance_id: o for o in await self._agents.agent(node).list(context)}
        await self._view.wait_revision(await self._storage.current_revision())
        actions = reconcile(self._situation(node, wanted, seen))
        self._note_orphans(node, actions)
        for action in actions:
            await self._act(action, node, fence)
        return actions

    async def _take_turn(self, node_id: str, turn: _Turn, fence: Compare) -> None:
        settings = self._settings
        unsettled = True
        soon = self._clock.monotonic() - turn.asked_s < settings.interval_s
        try:
            async with self._gate:
                actions = await self.look(node_id, fence)
            unsettled = any(not isinstance(action, KeepOrphan) for action in actions)
        except HypervisorError as exc:
            log.warning("node_not_reconciled", node_id=node_id, reason=exc.reason, error=str(exc))
        except Exception:
            log.exception("reconcile_defect", node_id=node_id)
        finally:
            turn.asking = False
            turn.asked_s = self._clock.monotonic()
            turn.again_s = min(2 * turn.again_s, settings.interval_s) if soon else settings.again_s
            turn.due_s = turn.asked_s + (turn.again_s if unsettled else settings.interval_s)

    def _turn(self, node_id: str) -> _Turn:
        turn = self._turns.get(node_id)
        if turn is None:
            # Each node at a time of its own, and the same one whoever leads.
            share = zlib.crc32(node_id.encode()) / 2**32
            turn = _Turn(
                due_s=self._clock.monotonic() + share * self._settings.interval_s,
                again_s=self._settings.again_s,
            )
            self._turns[node_id] = turn
        return turn

    def _notice(self, changes: tuple[ClusterChange, ...]) -> None:
        for change in changes:
            if change.kind is not Kind.NODE:
                continue
            current = None if change.current is None else change.current.value
            before = None if change.previous is None else change.previous.value
            if not isinstance(current, Node):
                self._turns.pop(change.object_id, None)
            elif (
                not isinstance(before, Node)
                or before.lease_id != current.lease_id
                or (before.drivers != current.drivers)
            ):
                turn = self._turn(change.object_id)
                turn.due_s, turn.again_s = self._clock.monotonic(), self._settings.again_s

    def _situation(
        self, node: Node, wanted: dict[str, Instance], seen: dict[str, Observation]
    ) -> NodeSituation:
        strangers = [instance_id for instance_id in seen if instance_id not in wanted]
        records = {i: found.value for i in strangers if (found := self._view.instance(i)) is not None}
        unknown = {i for i in strangers if i not in records}
        return NodeSituation(
            node_id=node.id,
            now=self._clock.now(),
            working={kind for kind in InstanceType if (driver := node.driver_for(kind)) and driver.available},
            wanted=wanted,
            observed=seen,
            others=records,
            deleted=self._on_record_as_gone(unknown) if unknown else (),
            orphans=self._turn(node.id).orphans,
            monotonic_s=self._clock.monotonic(),
            orphan_grace_s=self._settings.orphan_grace_s,
            records_since=self._view.records_since() if self._settings.keep_older else None,
        )

    def _on_record_as_gone(self, instance_ids: set[str]) -> set[str]:
        """Those of which an operation that has ended tells that they were here: without a record they are deleted."""
        return {
            operation.value.object_id
            for operation in self._view.operations()
            if operation.value.object_id in instance_ids and operation.value.done
        }

    def _note_orphans(self, node: Node, actions: tuple[NodeAction, ...]) -> None:
        turn = self._turn(node.id)
        now = self._clock.monotonic()
        # Those to be deleted as well: where that fails their grace does not begin anew.
        kept = {
            a.seen.instance_id: a
            for a in actions
            if isinstance(a, KeepOrphan) or (isinstance(a, DeleteCopy) and a.unknown)
        }
        for instance_id, action in kept.items():
            if instance_id not in turn.orphans:
                log.warning("orphan_kept", node_id=node.id, instance_id=instance_id, why=action.why)
        turn.orphans = {instance_id: turn.orphans.get(instance_id, now) for instance_id in kept}

    # --- actions

    async def _act(self, action: NodeAction, node: Node, fence: Compare) -> None:
        try:
            match action:
                case KeepOrphan():
                    return
                case TakeIn(seen):
                    await self._commit(partial(_take_in, node_id=node.id, seen=seen, fence=fence))
                case DeleteCopy(seen):
                    await self._delete_copy(action, node)
                case MarkLost(instance_id, epoch):
                    if await self._commit(
                        partial(_lose, node_id=node.id, instance_id=instance_id, epoch=epoch, fence=fence)
                    ):
                        log.error("instance_lost", node_id=node.id, instance_id=instance_id)
                case CreateAgain() | Adopt() | Start() | Stop() | GiveSizes():
                    await self._begin(action, node, fence)
        except HypervisorError as exc:
            # The next look decides anew.
            log.warning(
                "reconcile_action_failed",
                node_id=node.id,
                action=type(action).__name__,
                reason=exc.reason,
                error=str(exc),
            )

    async def _commit(self, decision: Callable[[Draft], bool]) -> bool:
        return (await self._committer.commit(decision)).value

    async def _delete_copy(self, action: DeleteCopy, node: Node) -> None:
        seen = action.seen
        # What the view does not have the store may have got since: asked for as late as can be.
        if action.unknown and await self._storage.get(keys.instance(seen.instance_id).path) is not None:
            return
        context = CallContext(f"reconcile-{node.id}", self._settings.timeout_s)
        await self._agents.agent(node).delete_copy(seen, context)
        log.warning(
            "copy_deleted", node_id=node.id, instance_id=seen.instance_id, epoch=seen.epoch, why=action.why
        )

    async def _begin(
        self, action: CreateAgain | Adopt | Start | Stop | GiveSizes, node: Node, fence: Compare
    ) -> None:
        """Begin an operation, as a user's call would; whoever dies meanwhile, it is brought to an end."""
        verb = _VERBS[type(action)]
        grace_s = _STOP_GRACE_S if isinstance(action, Stop) else None
        request = Mutation(Caller(SYSTEM, f"reconcile-{action.instance_id}"), "", "", wait=False)
        operation = self._operations.open(verb, request, object_kind=Kind.INSTANCE, grace_s=grace_s)
        deadline = self._clock.now() + timedelta(seconds=self._executor.settings.time_for(verb, grace_s))

        def decide(draft: Draft) -> OperationRecord | None:
            if isinstance(action, CreateAgain | Adopt):
                record = begin_create_again if isinstance(action, CreateAgain) else begin_adopt
                return record(
                    draft,
                    action.instance_id,
                    node_id=node.id,
                    epoch=action.epoch,
                    fence=fence,
                    operation=operation,
                    deadline=deadline,
                )
            instance = unheld(draft, action.instance_id, node_id=node.id, epoch=action.epoch, fence=fence)
            if instance is None or instance.desired is not _DESIRED.get(type(action), instance.desired):
                return None
            ref = InstanceRef(instance.id, instance.project)
            if isinstance(action, GiveSizes):
                spec = instance.spec
                change = SizeChange(spec.cpu_millis, spec.memory_mb)
                return begin_update(draft, self._rules, ref, change, operation=operation, deadline=deadline)
            return begin(draft, VERBS[verb], ref, operation=operation, deadline=deadline)

        def begun(recorded: OperationRecord | None, revision: int) -> None:
            if recorded is not None:
                self._executor.begin(recorded, revision)

        lane = Lane.PLACEMENTS if isinstance(action, GiveSizes) else Lane.RECORDS
        decided = await self._committer.commit(decide, then=begun, lane=lane)
        if decided.value is not None:
            log.warning("instance_reconciled", verb=verb, node_id=node.id, instance_id=action.instance_id)


_VERBS: dict[type[NodeAction], str] = {
    CreateAgain: RECREATE,
    Adopt: ADOPT,
    Start: "start",
    Stop: "stop",
    GiveSizes: "update",
}


_DESIRED: dict[type[NodeAction], DesiredState] = {Start: DesiredState.RUNNING, Stop: DesiredState.STOPPED}
"""What was wanted when these were decided, and still has to be."""


def _take_in(draft: Draft, *, node_id: str, seen: Observation, fence: Compare) -> bool:
    draft.guard(fence)
    return fold_observation(draft, node_id=node_id, seen=seen, authoritative=False)


def _lose(draft: Draft, *, node_id: str, instance_id: str, epoch: int, fence: Compare) -> bool:
    if unheld(draft, instance_id, node_id=node_id, epoch=epoch, fence=fence) is None:
        return False
    return mark_lost(draft, node_id=node_id, instance_id=instance_id)
