"""What may be done with an instance in which state, and how its record changes when an operation begins. Pure.

``VERBS`` is the one table; creating is not in it (there is no instance yet, see ``placement.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from msgspec import structs

from hypervisor.core.errors import Conflict, FailedPrecondition, NotFound, Unavailable, Unimplemented
from hypervisor.core.images import Image
from hypervisor.core.machines import SnapshotKind
from hypervisor.core.model import Instance, Node, OperationRecord
from hypervisor.core.states import DesiredState, InstanceStatus, NodeStatus
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.placement import check_same_request
from hypervisor.server.services import ClusterView, InstanceRef, Versioned

__all__ = [
    "CANCELLABLE",
    "LED",
    "VERBS",
    "VerbRule",
    "begin",
    "check_capability",
    "check_version",
    "find_in_view",
    "find_instance",
    "instance_not_found",
    "node_unreachable",
]

_S = InstanceStatus
_RUNS = frozenset({_S.RUNNING, _S.PAUSED})
_RESTS = frozenset({_S.STOPPED, _S.FAILED})

LED = frozenset({"drain", "restore"})
"""Verbs of operations that the leader carries out, whichever server recorded them."""

CANCELLABLE = frozenset({"create", "move", "start"}) | LED
"""Verbs whose unfinished work can be undone."""


@dataclass(frozen=True, slots=True)
class VerbRule:
    """In which states a verb may begin, what it makes of the record, and the error for other states.

    ``begun`` and ``desired`` None: as they are. ``capability``: what the instance's driver has to be able to do.
    """

    verb: str
    allowed: frozenset[InstanceStatus]
    begun: InstanceStatus | None
    desired: DesiredState | None
    refusal: str
    advice: str
    capability: str = ""

    def needs(self, operation: OperationRecord) -> str:
        """The capability that the operation needs of the instance's driver."""
        if self.verb == "create-snapshot" and operation.snapshot_kind is SnapshotKind.DIFF:
            return "snapshot-diff"
        return self.capability or self.verb


VERBS: Mapping[str, VerbRule] = MappingProxyType(
    {
        rule.verb: rule
        for rule in (
            VerbRule(
                "start", _RESTS, None, DesiredState.RUNNING, "ALREADY_RUNNING", "there is nothing to start"
            ),
            VerbRule(
                "stop", _RUNS, _S.STOPPING, DesiredState.STOPPED, "NOT_RUNNING", "there is nothing to stop"
            ),
            VerbRule(
                "restart",
                _RUNS | _RESTS,
                _S.STOPPING,
                DesiredState.RUNNING,
                "NOT_RUNNING",
                "wait for the work in progress",
            ),
            VerbRule(
                "delete",
                frozenset(set(_S)),
                _S.DELETING,
                DesiredState.DELETED,
                "INSTANCE_RUNNING",
                "stop it first, or delete it with force",
            ),
            VerbRule(
                "pause",
                frozenset({_S.RUNNING}),
                None,
                DesiredState.PAUSED,
                "NOT_RUNNING",
                "only what runs can be paused",
            ),
            VerbRule(
                "resume",
                frozenset({_S.PAUSED}),
                None,
                DesiredState.RUNNING,
                "NOT_PAUSED",
                "there is nothing to resume",
                capability="pause",
            ),
            VerbRule(
                "suspend",
                _RUNS,
                _S.STOPPING,
                DesiredState.STOPPED,
                "NOT_RUNNING",
                "there is no memory to put on disk",
            ),
            VerbRule("update", _RUNS | _RESTS, None, None, "NOT_SETTLED", "wait for the work in progress"),
            *(
                VerbRule(
                    verb,
                    _RUNS | _RESTS,
                    None,
                    None,
                    "NOT_SETTLED",
                    "wait for the work in progress",
                    capability="snapshot",
                )
                for verb in ("create-snapshot", "restore-snapshot", "delete-snapshot")
            ),
        )
    }
)


def begin(
    draft: Draft,
    rule: VerbRule,
    ref: InstanceRef,
    *,
    operation: OperationRecord,
    deadline: datetime,
    force: bool = False,
) -> OperationRecord:
    """Record that the operation begins; returns it, or the one that a request with the same id began.

    ``operation`` names no object yet. Raises what the rules of ComputeService say.
    """
    operation_key = keys.operation(operation.id)
    known = draft.get(operation_key) if operation.request_id else None
    if known is not None:
        check_same_request(known.value, operation)
        return known.value
    found = find_instance(draft, ref)
    instance = found.value
    check_version(found, ref.resource_version, what=f"instance {instance.name}")
    if instance.operation_id:
        raise Conflict(
            f"instance {instance.name} is held by operation {instance.operation_id}: wait for it, then try again",
            reason="CONCURRENT_OPERATION",
            metadata={"operation_id": instance.operation_id, "instance_id": instance.id},
        )
    node = draft.peek(keys.node(instance.node_id))
    _check_state(rule, instance, node.value if node else None, operation=operation, force=force)
    runs = instance.status in _RUNS
    begun = rule.begun if runs or rule.verb == "delete" else None
    draft.put(
        keys.instance(instance.id),
        structs.replace(
            instance,
            status=begun or instance.status,
            status_message="" if begun else instance.status_message,
            desired=rule.desired or instance.desired,
            operation_id=operation.id,
            transition_deadline=deadline,
            updated_at=draft.now,
        ),
    )
    recorded = structs.replace(
        operation, object_id=instance.id, object_name=instance.name, project=instance.project
    )
    if operation.request_id:
        draft.put(operation_key, recorded)
    else:
        draft.create(operation_key, recorded)
    return recorded


def find_instance(draft: Draft, ref: InstanceRef) -> Versioned[Instance]:
    """The instance meant by an id, else by a name in the project. Raises NotFound (``INSTANCE_NOT_FOUND``)."""
    found = draft.get(keys.instance(ref.instance))
    if found is None:
        claim = draft.get(keys.name(ref.project, ref.instance))
        found = None if claim is None else draft.get(keys.instance(claim.value.instance_id))
    if found is None:
        raise instance_not_found(ref)
    return found


def find_in_view(view: ClusterView, ref: InstanceRef) -> Versioned[Instance]:
    """The instance meant, from memory. NotFound (``INSTANCE_NOT_FOUND``), Conflict (``RESOURCE_VERSION_MISMATCH``)."""
    found = view.instance(ref.instance) or view.instance_named(ref.project, ref.instance)
    if found is None:
        raise instance_not_found(ref)
    check_version(found, ref.resource_version, what=f"instance {found.value.name}")
    return found


def instance_not_found(ref: InstanceRef) -> NotFound:
    """The error for an instance that does not exist."""
    return NotFound(
        f"there is no instance {ref.instance!r} in project {ref.project}: see `instance list`",
        reason="INSTANCE_NOT_FOUND",
        metadata={"instance": ref.instance, "project": ref.project},
    )


def check_version(
    found: Versioned[Instance] | Versioned[Node] | Versioned[Image], wanted: int, *, what: str
) -> None:
    """Refuse to change something that is not as the caller saw it (``wanted`` 0: any version)."""
    if wanted and found.revision != wanted:
        raise Conflict(
            f"{what} was changed since version {wanted}: read it again and decide anew",
            reason="RESOURCE_VERSION_MISMATCH",
            metadata={"wanted": str(wanted), "current": str(max(found.revision, 0))},
        )


def check_capability(instance: Instance, node: Node, verb: str) -> None:
    """Refuse what the instance's driver cannot do: Unimplemented (``CAPABILITY_MISSING``), or Unavailable
    (``DRIVER_UNAVAILABLE``) when it cannot work now."""
    driver = node.driver_for(instance.type)
    metadata = {"node": node.hostname, "type": instance.type.value, "verb": verb}
    if driver is None or not driver.available:
        why = (
            "it has no such driver any more"
            if driver is None
            else driver.reason or "its driver does not work"
        )
        raise Unavailable(
            f"node {node.hostname} cannot {verb} {instance.type.value} instances now: {why}",
            reason="DRIVER_UNAVAILABLE",
            metadata=metadata,
            retry_after_s=5.0,
        )
    lacking = driver.lacks(verb)
    if lacking is not None:
        raise Unimplemented(
            f"driver {driver.name} on node {node.hostname} cannot {verb}: {lacking.reason}",
            reason="CAPABILITY_MISSING",
            metadata={**metadata, "driver": driver.name},
        )


def node_unreachable(instance: Instance, node: Node | None) -> Unavailable:
    """The error for an instance whose node cannot be reached."""
    hostname = node.hostname if node is not None else instance.node_id
    return Unavailable(
        f"node {hostname}, which has instance {instance.name}, cannot be reached: bring it back, then try again",
        reason="NODE_UNREACHABLE",
        metadata={"node": hostname, "instance_id": instance.id},
        retry_after_s=5.0,
    )


def _check_state(
    rule: VerbRule, instance: Instance, node: Node | None, *, operation: OperationRecord, force: bool
) -> None:
    deleting = rule.desired is DesiredState.DELETED
    if instance.desired is DesiredState.DELETED and not deleting:
        raise FailedPrecondition(
            f"instance {instance.name} is being deleted",
            reason="INSTANCE_DELETING",
            metadata={"instance_id": instance.id},
        )
    if node is None or node.status is NodeStatus.OFFLINE:
        raise node_unreachable(instance, node)
    refused = instance.status not in rule.allowed and instance.status is not InstanceStatus.UNKNOWN
    if refused or (deleting and instance.status in _RUNS and not force):
        paused = rule.verb == "start" and instance.status is InstanceStatus.PAUSED
        raise FailedPrecondition(
            f"instance {instance.name} is {instance.status.value}: {'resume it' if paused else rule.advice}",
            reason=rule.refusal,
            metadata={"instance_id": instance.id, "status": instance.status.value},
        )
    if not deleting:
        # Deleting is tried even without a working driver: the agent knows best what is left of the instance.
        check_capability(instance, node, rule.needs(operation))
