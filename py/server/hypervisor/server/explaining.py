"""Why an instance is where it is, where one like it would go, and how many more would fit. Nothing is recorded.

The answers are made of the scheduler's filters and scores, node by node, on a copy of the snapshot: in pieces, so that
the calls of others go on meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace

from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.model import Instance, InstanceSpec, PlacementRecord, ScorePart
from hypervisor.ext.scoring import tie_key
from hypervisor.server.drafts import Batch, Known
from hypervisor.server.instances import check_project
from hypervisor.server.placement import Placer
from hypervisor.server.scheduler.case import Case
from hypervisor.server.scheduler.contract import NodeState, Placement, Request, Snapshot
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.scheduler.judge import Check, Judgement, hash_of
from hypervisor.server.services import InstanceDraft

__all__ = ["CapacityAnswer", "Explainer", "Explanation", "JudgedNode", "NodeRoom", "RefusalCount"]

_PIECE = 100
"""Nodes judged before others get their turn."""


@dataclass(frozen=True, slots=True)
class JudgedNode:
    """What the scheduler makes of one node; ``rank`` is 1 for the best, 0 where it does not fit."""

    node_id: str
    hostname: str
    rank: int
    score: int
    parts: tuple[ScorePart, ...]
    failed: tuple[Check, ...]

    @property
    def fits(self) -> bool:
        """Whether it passes all filters."""
        return not self.failed


@dataclass(frozen=True, slots=True)
class RefusalCount:
    """How many nodes fail a filter first, and what one of them says."""

    filter: str
    nodes: int
    example: str
    hostname: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """See PlacementExplanation in placement.proto."""

    node_id: str
    hostname: str
    best_node_id: str
    recorded: PlacementRecord | None
    nodes_considered: int
    nodes_fit: int
    nodes: tuple[JudgedNode, ...]
    asked_node: JudgedNode | None
    refusals: tuple[RefusalCount, ...]
    scheduler: str
    revision: int


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """How many more fit on a node, and which check ends it; None where the limit of the count did."""

    node_id: str
    hostname: str
    count: int
    limit: Check | None


@dataclass(frozen=True, slots=True)
class CapacityAnswer:
    """See ClusterCapacity in placement.proto."""

    count: int
    limit_reached: bool
    nodes: tuple[NodeRoom, ...]
    limits: tuple[RefusalCount, ...]
    nodes_considered: int
    revision: int


class Explainer:
    """See the module's docstring. ``resolve_node`` turns an id or host name into an id, or raises NotFound."""

    def __init__(
        self,
        placer: Placer,
        known: Known,
        clock: Clock,
        *,
        resolve_node: Callable[[str], str],
    ) -> None:
        self._placer = placer
        self._known = known
        self._clock = clock
        self._resolve_node = resolve_node
        scheduler = placer.scheduler
        # Another scheduler's reasons are not known: its answers are told, and explained by the built-in rules.
        self._own = isinstance(scheduler, DefaultScheduler)
        self._rules = scheduler if isinstance(scheduler, DefaultScheduler) else DefaultScheduler()

    async def would_be(self, order: InstanceDraft, *, node: str = "", max_nodes: int = 5) -> Explanation:
        """Where an instance like this would be placed, and why."""
        check_project(order.project)
        snapshot, revision = self._look(order)
        seed = f"{order.project}/{order.name}"
        return await self._explain(
            self._placer.request(order, seed=seed), snapshot, revision, node=node, max_nodes=max_nodes
        )

    async def instance(self, instance: Instance, *, node: str = "", max_nodes: int = 5) -> Explanation:
        """Why the instance is where it is: judged as if it were placed now, with nothing of its own held."""
        order = InstanceDraft(
            name=instance.name,
            project=instance.project,
            type=instance.type,
            spec=instance.spec,
            labels=instance.labels,
        )
        _, revision = self._look(replace(order, spec=_anywhere(instance)))
        request = self._placer.request(order, seed=instance.id)
        return await self._explain(
            request,
            self._placer.without(instance),
            revision,
            node=node,
            max_nodes=max_nodes,
            own_node=instance.node_id,
            recorded=instance.placement,
        )

    async def capacity(self, order: InstanceDraft, *, limit: int, max_nodes: int = 1000) -> CapacityAnswer:
        """How many more instances like this fit, and where."""
        check_project(order.project)
        batch = Batch(self._known, now=self._clock.now())
        snapshot = self._placer.look(batch.draft(), order)
        revision = self._known.revision
        request = self._placer.request(order, seed="")
        room = self._rules.capacity(request, snapshot, limit=limit)
        total = sum(room.counts.values())
        case = Case(request, room.after)
        judge = self._rules.judge
        nodes: list[NodeRoom] = []
        async for state in _in_pieces(room.after.nodes.values()):
            count = room.counts.get(state.node.id, 0)
            limit_check = judge.reason_against(case, state)
            nodes.append(NodeRoom(state.node.id, state.node.hostname, count, limit_check))
        nodes.sort(key=lambda n: (-n.count, n.hostname))
        return CapacityAnswer(
            count=total,
            limit_reached=total >= limit,
            nodes=tuple(nodes[:max_nodes]),
            limits=_counted((n.limit, n.hostname) for n in nodes if n.limit is not None),
            nodes_considered=len(nodes),
            revision=revision,
        )

    def _look(self, order: InstanceDraft) -> tuple[Snapshot, int]:
        """A copy of the cluster as the next decision would see it."""
        batch = Batch(self._known, now=self._clock.now())
        live = self._placer.look(batch.draft(), order)
        return Snapshot(dict(live.nodes), dict(live.instances)), self._known.revision

    async def _explain(
        self,
        request: Request,
        snapshot: Snapshot,
        revision: int,
        *,
        node: str,
        max_nodes: int,
        own_node: str = "",
        recorded: PlacementRecord | None = None,
    ) -> Explanation:
        asked_id = self._resolve_node(node) if node else ""
        case, judge = Case(request, snapshot), self._rules.judge
        judged = [judge.judge(case, state) async for state in _in_pieces(snapshot.nodes.values())]
        ranked = _ranked(judged, request)
        best = ranked[0].node_id if ranked and ranked[0].fits else ""
        if not self._own:
            answer = self._placer.scheduler.schedule(request, snapshot)
            best = answer.node_id if isinstance(answer, Placement) else ""
        fitting = [one for one in ranked if one.fits]
        shown = (fitting or ranked)[:max_nodes]
        mine = next((one for one in ranked if one.node_id == (own_node or best)), None)
        if mine is not None and mine not in shown:
            shown.append(mine)
        return Explanation(
            node_id=own_node or best,
            hostname="" if mine is None else mine.hostname,
            best_node_id=best,
            recorded=recorded,
            nodes_considered=len(judged),
            nodes_fit=len(fitting),
            nodes=tuple(shown),
            asked_node=next((one for one in ranked if one.node_id == asked_id), None) if asked_id else None,
            refusals=_refusals(judged),
            scheduler=self._placer.scheduler.name,
            revision=revision,
        )


def _anywhere(instance: Instance) -> InstanceSpec:
    """The spec for looking at the cluster: nodes and labels that have gone since are no error, but told per node."""
    return structs.replace(instance.spec, node="", node_selector=())


async def _in_pieces(states: Iterable[NodeState]) -> AsyncIterator[NodeState]:
    for number, state in enumerate(states):
        if number and number % _PIECE == 0:
            await asyncio.sleep(0)
        yield state


def _ranked(judged: Iterable[Judgement], request: Request) -> list[JudgedNode]:
    """Those that fit, best first as the scheduler ranks them; then those that do not, fewest failed checks first."""
    seed = hash_of(request.seed)

    def order(one: Judgement) -> tuple[object, ...]:
        node = one.state.node
        if one.fits:
            return 0, -one.score, tie_key(seed, hash_of(node.id))
        return 1, len(one.failed), node.hostname

    found = []
    for place, one in enumerate(sorted(judged, key=order), start=1):
        found.append(
            JudgedNode(
                node_id=one.state.node.id,
                hostname=one.state.node.hostname,
                rank=place if one.fits else 0,
                score=one.score,
                parts=one.parts,
                failed=one.failed,
            )
        )
    return found


def _refusals(judged: Iterable[Judgement]) -> tuple[RefusalCount, ...]:
    return _counted((one.failed[0], one.state.node.hostname) for one in judged if one.failed)


def _counted(checks: Iterable[tuple[Check, str]]) -> tuple[RefusalCount, ...]:
    """How many of the checks, each with the host name of its node, there are of each filter."""
    found: dict[str, RefusalCount] = {}
    for check, hostname in checks:
        known = found.get(check.filter)
        if known is None:
            found[check.filter] = RefusalCount(check.filter, 1, check.reason, hostname)
        else:
            found[check.filter] = replace(known, nodes=known.nodes + 1)
    return tuple(sorted(found.values(), key=lambda r: (-r.nodes, r.filter)))
