"""Nodes: what the calls of ClusterService do. Implements ``Nodes``; see there and cluster.proto for the rules.

A heartbeat renews the node's lease and writes nothing; measured use stays in the memory of the server it came to.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import structlog
from msgspec import structs

from hypervisor.core.availability import NodeFencing
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound
from hypervisor.core.model import (
    DriverInfo,
    Instance,
    InstanceStats,
    InstancesUsage,
    Node,
    NodeResources,
    Observation,
    OperationRecord,
    Taint,
)
from hypervisor.core.resources import Resources
from hypervisor.core.states import DesiredState, TaintEffect
from hypervisor.server import keys
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.drafts import Decision, Draft
from hypervisor.server.ledger import AllocationRules
from hypervisor.server.moving import forget_leftover
from hypervisor.server.node_changes import (
    check_not_draining,
    fencing_told,
    fold_observation,
    incarnation_mismatch,
    mark_missing,
    node_not_found,
    record_cordon,
    record_deregistration,
    record_disarming,
    record_evacuation,
    record_fencing,
    record_registration,
    record_taint,
    record_untaint,
)
from hypervisor.server.node_facts import ServerFacts
from hypervisor.server.operations import OperationService
from hypervisor.server.services import (
    ClusterChange,
    HeartbeatTimes,
    Kind,
    Mutation,
    NodePlacements,
    NodeRegistration,
    NodeUsage,
    PlannedMove,
    Versioned,
)
from hypervisor.server.store.storage import OutcomeUnknown, Storage
from hypervisor.server.verbs import check_version
from hypervisor.server.view import StoreView

__all__ = ["NodeService"]

_CAPACITY_TOLERANCE = 0.01
_IMAGES_TAKEN = 1000
"""Of those that a heartbeat names."""

log = structlog.get_logger(__name__)


class NodeService:
    """See ``Nodes`` for the contract."""

    def __init__(
        self,
        storage: Storage,
        view: StoreView,
        committer: GroupCommitter,
        operations: OperationService,
        clock: Clock,
        *,
        times: HeartbeatTimes,
        facts: ServerFacts,
        rules: AllocationRules,
    ) -> None:
        self._storage = storage
        self._view = view
        self._committer = committer
        self._operations = operations
        self._clock = clock
        self._times = times
        self._facts = facts
        self._rules = rules
        self._usage: dict[str, NodeUsage] = {}
        """With the time of the heartbeat in the place of its age."""
        self._stats: dict[str, dict[str, InstanceStats]] = {}
        self.on_unexpected: Callable[[str, Sequence[Observation]], None] = lambda _node, _seen: None
        """Told of what nodes report and should not have."""
        self.preview: Callable[[Instance], str] = lambda instance: instance.node_id
        """Where an instance would be placed anew."""
        view.add_listener(self._forget_gone)

    async def register(self, registration: NodeRegistration) -> tuple[Versioned[Node], HeartbeatTimes]:
        lease = await self._storage.grant_lease(self._times.timeout_s)
        try:
            decided = await self._committer.commit(
                lambda draft: record_registration(draft, registration, lease_id=lease.id)
            )
        except OutcomeUnknown:
            raise
        except HypervisorError:
            # Refused: the lease is of no use. (A caller that is cancelled does not learn whether it is in use.)
            with suppress(HypervisorError):
                await self._storage.revoke_lease(lease.id)
            raise
        node, restarted = decided.value
        log.info("node_registered", node_id=node.id, hostname=node.hostname, restarted=restarted)
        await self._observe_all(node.id, registration.observations, authoritative=restarted)
        await self._mark_missing(node.id, registration.observations)
        await self._view.wait_revision(decided.revision)
        found = self._committer.find(keys.node(node.id)) or Versioned(node, decided.revision)
        return found, replace(self._times, disarmed=bool(found.value.disarmed))

    async def heartbeat(
        self,
        node_id: str,
        incarnation: str,
        resources: NodeResources,
        stats: Mapping[str, InstanceStats],
        *,
        usage: InstancesUsage,
        images: Sequence[str] = (),
        fencing: NodeFencing | None = None,
    ) -> HeartbeatTimes:
        node = self._present(node_id, incarnation)
        try:
            await self._storage.keep_alive(node.lease_id)
        except NotFound as exc:
            raise FailedPrecondition(
                f"the lease of node {node.hostname} has ended: register again",
                reason="LEASE_ENDED",
                metadata={"node_id": node_id},
            ) from exc
        self._usage[node_id] = NodeUsage(resources, usage, self._clock.monotonic())
        self._keep_stats(node_id, stats, running=usage.running)
        self._facts.heard(node_id, resources, digests=images[:_IMAGES_TAKEN])
        if _differs(node.capacity, resources.capacity):
            await self._committer.commit(lambda draft: _record_capacity(draft, node_id, resources.capacity))
        if fencing_told(node, fencing) != node.fencing:
            await self._committer.commit(lambda draft: record_fencing(draft, node_id, incarnation, fencing))
        return replace(self._times, disarmed=bool(node.disarmed))

    async def update_status(
        self,
        node_id: str,
        incarnation: str,
        *,
        drivers: tuple[DriverInfo, ...] | None,
        observations: tuple[Observation, ...],
    ) -> tuple[str, ...]:
        node = self._present(node_id, incarnation)
        if drivers is not None and drivers != node.drivers:
            await self._committer.commit(lambda draft: _record_drivers(draft, node_id, incarnation, drivers))
        return await self._observe_all(node_id, observations, authoritative=False)

    async def deregister(
        self, node: str, mutation: Mutation, *, resource_version: int
    ) -> Versioned[OperationRecord]:
        def change(draft: Draft, found: Versioned[Node]) -> None:
            node_id = found.value.id
            placed = [i.value for i in self._view.instances_on(node_id)]
            for other in self._view.instances():
                move = other.value.move
                if move is not None and move.elsewhere[0] == node_id:
                    # What a move left there goes with the node.
                    forget_leftover(draft, other.value.id, started_at=move.started_at)
            record_deregistration(draft, found.value, placed=len(placed))

        return await self._at_once("deregister", node, mutation, resource_version, change)

    async def cordon(
        self, node: str, mutation: Mutation, *, reason: str, resource_version: int
    ) -> Versioned[OperationRecord]:
        return await self._at_once(
            "cordon",
            node,
            mutation,
            resource_version,
            lambda draft, found: record_cordon(draft, found.value, schedulable=False, reason=reason),
        )

    async def uncordon(
        self, node: str, mutation: Mutation, *, resource_version: int
    ) -> Versioned[OperationRecord]:
        def change(draft: Draft, found: Versioned[Node]) -> None:
            check_not_draining(draft, found.value)
            record_cordon(draft, found.value, schedulable=True, reason="")

        return await self._at_once("uncordon", node, mutation, resource_version, change)

    async def taint(
        self, node: str, mutation: Mutation, *, taint: Taint, resource_version: int
    ) -> Versioned[OperationRecord]:
        return await self._at_once(
            "taint",
            node,
            mutation,
            resource_version,
            lambda draft, found: record_taint(draft, found.value, taint),
        )

    async def untaint(
        self, node: str, mutation: Mutation, *, key: str, effect: TaintEffect | None, resource_version: int
    ) -> Versioned[OperationRecord]:
        return await self._at_once(
            "untaint",
            node,
            mutation,
            resource_version,
            lambda draft, found: record_untaint(draft, found.value, key=key, effect=effect),
        )

    async def evacuate(
        self, node: str, mutation: Mutation, *, resource_version: int
    ) -> Versioned[OperationRecord]:
        return await self._at_once(
            "evacuate",
            node,
            mutation,
            resource_version,
            lambda draft, found: record_evacuation(draft, found.value, principal=mutation.caller.principal),
        )

    def plan_evacuation(self, node: str) -> tuple[PlannedMove, ...]:
        found = self.resolve(node).value
        placed = sorted((i.value for i in self._view.instances_on(found.id)), key=lambda i: i.name)
        return tuple(self._planned(instance) for instance in placed)

    def _planned(self, instance: Instance) -> PlannedMove:
        if instance.desired is DesiredState.DELETED:
            return PlannedMove(instance.id, instance.name, reason="it is being deleted: it is forgotten")
        try:
            return PlannedMove(instance.id, instance.name, self.preview(instance))
        except HypervisorError as exc:
            return PlannedMove(instance.id, instance.name, reason=exc.message)

    async def set_fencing(
        self, node: str, mutation: Mutation, *, armed: bool, reason: str, resource_version: int
    ) -> Versioned[OperationRecord]:
        why = "" if armed else f"switched off by {mutation.caller.principal}{f': {reason}' if reason else ''}"
        return await self._at_once(
            "arm" if armed else "disarm",
            node,
            mutation,
            resource_version,
            lambda draft, found: record_disarming(draft, found.value, why=why),
        )

    def resolve(self, node: str, *, resource_version: int = 0) -> Versioned[Node]:
        found = self._view.node(node) or self._view.node_named(node)
        if found is None:
            raise node_not_found(node)
        check_version(found, resource_version, what=f"node {found.value.hostname}")
        return found

    def allocatable(self, node: Node) -> Resources:
        return self._rules.allocatable(node.capacity)

    def placements(self, node_id: str) -> NodePlacements | None:
        return self._facts.health.of(node_id)

    def usage(self, node_id: str) -> NodeUsage | None:
        found = self._usage.get(node_id)
        return None if found is None else replace(found, age_s=self._clock.monotonic() - found.age_s)

    def last_stats(self, instance_id: str) -> InstanceStats | None:
        """The newest sample of an instance that came with a heartbeat to this server."""
        found = self._view.instance(instance_id)
        return None if found is None else self._stats.get(found.value.node_id, {}).get(instance_id)

    def _keep_stats(self, node_id: str, stats: Mapping[str, InstanceStats], *, running: int) -> None:
        """Keep the newest samples; of a node with more instances than a heartbeat carries, also those it left out."""
        kept = dict(stats)
        if running > len(stats):
            placed = {found.value.id for found in self._view.instances_on(node_id)}
            before = self._stats.get(node_id, {})
            kept = {i: sample for i, sample in before.items() if i in placed} | kept
        self._stats[node_id] = kept

    def _forget_gone(self, changes: tuple[ClusterChange, ...]) -> None:
        """Drop what was measured on nodes that left, whichever server they left at."""
        for change in changes:
            if change.kind is Kind.NODE and change.current is None:
                self._usage.pop(change.object_id, None)
                self._stats.pop(change.object_id, None)

    async def _at_once(
        self,
        verb: str,
        node: str,
        mutation: Mutation,
        resource_version: int,
        change: Callable[[Draft, Versioned[Node]], None],
    ) -> Versioned[OperationRecord]:
        """An operation that is one commit: it is recorded as done together with its effect."""
        opened = self._operations.open(verb, mutation, object_kind=Kind.NODE)

        def decide(draft: Draft) -> OperationRecord:
            known = self._operations.repeated(draft, opened)
            if known is not None:
                return known
            found = draft.get(keys.node(node))
            if found is None:
                claim = draft.get(keys.hostname(node))
                found = None if claim is None else draft.get(keys.node(claim.value.node_id))
            if found is None:
                raise node_not_found(node)
            check_version(found, resource_version, what=f"node {found.value.hostname}")
            change(draft, found)
            return self._operations.record_done(
                draft, structs.replace(opened, object_id=found.value.id, object_name=found.value.hostname)
            )

        decided = await self._committer.commit(decide)
        log.info("node_changed", verb=verb, node_id=decided.value.object_id, principal=opened.principal)
        return await self._operations.conclude(decided, wait=mutation.wait)

    def _present(self, node_id: str, incarnation: str) -> Node:
        """The node, if this incarnation of its agent is the one registered and its lease lives."""
        found = self._committer.find(keys.node(node_id))
        if found is None:
            raise node_not_found(node_id)
        if found.value.incarnation != incarnation:
            raise incarnation_mismatch(found.value)
        if self._committer.find(keys.node_lease(node_id)) is None:
            raise FailedPrecondition(
                f"the lease of node {found.value.hostname} has ended: register again",
                reason="LEASE_ENDED",
                metadata={"node_id": node_id},
            )
        return found.value

    async def _observe_all(
        self, node_id: str, observations: tuple[Observation, ...], *, authoritative: bool
    ) -> tuple[str, ...]:
        """Fold all observations in, in one batch if they fit; returns the ids that should not be there."""
        expected = await self._commit_all(
            [
                partial(fold_observation, node_id=node_id, seen=o, authoritative=authoritative)
                for o in observations
            ]
        )
        unexpected = tuple(
            seen.instance_id for seen, known in zip(observations, expected, strict=True) if not known
        )
        if unexpected:
            self.on_unexpected(
                node_id, [seen for seen, known in zip(observations, expected, strict=True) if not known]
            )
            log.warning("unexpected_instances", node_id=node_id, instance_ids=unexpected[:20])
        return unexpected

    async def _mark_missing(self, node_id: str, observations: tuple[Observation, ...]) -> None:
        """Instances recorded on the node that its registration does not name: the reconciler asks for them."""
        present = {seen.instance_id for seen in observations}
        absent = [i.value.id for i in self._view.instances_on(node_id) if i.value.id not in present]
        marked = await self._commit_all(
            [partial(mark_missing, node_id=node_id, instance_id=instance_id) for instance_id in absent]
        )
        if any(marked):
            missing = [
                instance_id for instance_id, is_missing in zip(absent, marked, strict=True) if is_missing
            ]
            log.warning(
                "instances_not_reported", node_id=node_id, instance_ids=missing[:20], count=len(missing)
            )

    async def _commit_all(self, decisions: Sequence[Decision[bool]]) -> list[bool]:
        """Commit many decisions in as few transactions as they fit in."""
        # Not a task group: it would wrap the store's refusal, which the caller is to be told as it is.
        outcomes = await asyncio.gather(
            *(self._committer.commit(decision) for decision in decisions), return_exceptions=True
        )
        decided = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            decided.append(outcome.value)
        return decided


def _differs(old: Resources, new: Resources) -> bool:
    """Whether a capacity changed by more than file systems and kernels wobble by themselves."""
    return any(
        abs(before - after) > _CAPACITY_TOLERANCE * max(before, 1)
        for before, after in (
            (old.cpu_millis, new.cpu_millis),
            (old.memory_bytes, new.memory_bytes),
            (old.disk_bytes, new.disk_bytes),
        )
    )


def _record_capacity(draft: Draft, node_id: str, capacity: Resources) -> None:
    found = draft.get(keys.node(node_id))
    if found is not None and found.value.capacity != capacity:
        draft.put(keys.node(node_id), structs.replace(found.value, capacity=capacity, updated_at=draft.now))


def _record_drivers(draft: Draft, node_id: str, incarnation: str, drivers: tuple[DriverInfo, ...]) -> None:
    found = draft.get(keys.node(node_id))
    if found is not None and found.value.incarnation == incarnation and found.value.drivers != drivers:
        draft.put(keys.node(node_id), structs.replace(found.value, drivers=drivers, updated_at=draft.now))
