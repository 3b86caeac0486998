"""What must hold, looked at whenever something changes: in the store (every revision) and on the machines (every run).

Both see the truth, not what any part of the product believes. A breach raises :class:`Violation` at once.
"""

from collections import defaultdict
from collections.abc import Callable

from hvsim.trace import Trace, Violation
from hypervisor.core.model import Allocation, Instance, Node, OperationRecord, decode
from hypervisor.core.resources import ZERO
from hypervisor.core.states import DesiredState, InstanceStatus, OperationState, can_move
from hypervisor.server import keys
from hypervisor.server.store.storage import Change

__all__ = ["RuntimeTruth", "StoreTruth"]

_INSTANCES = keys.instance("").path
_ALLOCATIONS = keys.allocation("").path
_OPERATIONS = keys.operation("").path
_NODES = keys.node("").path
_NAMES = "/hypervisor/names/"


class StoreTruth:
    """The records as they are in the store, and what may never become of them."""

    def __init__(self, trace: Trace, fail: Callable[[str], None]) -> None:
        self._trace = trace
        self._fail = fail
        self.instances: dict[str, Instance] = {}
        self.operations: dict[str, OperationRecord] = {}
        self.allocations: dict[str, Allocation] = {}
        self.nodes: dict[str, Node] = {}
        self.names: set[str] = set()
        self.removed: dict[str, str] = {}
        """Ids of instances that were, with why they went."""
        self.made_by: dict[str, set[str]] = defaultdict(set)
        """Instances made by the id of the create."""
        self.by_request: dict[tuple[str, str], str] = {}
        """The operation of each request."""
        self.revision = 0

    def changed(self, revision: int, changes: tuple[Change, ...]) -> None:
        """A commit was applied."""
        self.revision = revision
        touched: set[str] = set()
        gone: list[Instance] = []
        self._trace.add(
            f"store {revision} "
            + " ".join(
                f"{'+' if c.item is not None else '-'}{c.key.removeprefix('/hypervisor/')}" for c in changes
            )
        )
        for change in changes:
            key, item = change.key, change.item
            if key.startswith(_OPERATIONS):
                self._operation(key, None if item is None else decode(OperationRecord, item.value, key=key))
            elif key.startswith(_NAMES):
                if item is None:
                    self.names.discard(key)
                else:
                    self.names.add(key)
            elif key.startswith(_NODES):
                if item is None:
                    self.nodes.pop(key.removeprefix(_NODES), None)
                else:
                    node = decode(Node, item.value, key=key)
                    self.nodes[node.id] = node
        for change in changes:
            key, item = change.key, change.item
            if key.startswith(_INSTANCES):
                instance_id = key.removeprefix(_INSTANCES)
                old = self.instances.get(instance_id)
                if item is None:
                    if old is not None:
                        gone.append(old)
                        touched.add(old.node_id)
                        del self.instances[instance_id]
                else:
                    new = decode(Instance, item.value, key=key)
                    self._instance(old, new)
                    touched.update((new.node_id, old.node_id if old else ""))
                    self.instances[instance_id] = new
            elif key.startswith(_ALLOCATIONS):
                node_id = key.removeprefix(_ALLOCATIONS)
                touched.add(node_id)
                if item is None:
                    self.allocations.pop(node_id, None)
                else:
                    self.allocations[node_id] = decode(Allocation, item.value, key=key)
        for old in gone:
            self._gone(old)
        if touched:
            self._reserved(touched)

    def _operation(self, key: str, new: OperationRecord | None) -> None:
        old = self.operations.get(key.removeprefix(_OPERATIONS))
        if new is None:
            if old is not None and not old.done:
                self._fail(f"operation {old.id} was removed before its end")
            self.operations.pop(key.removeprefix(_OPERATIONS), None)
            return
        self._trace.add(
            f"operation {new.id[-6:]} {new.verb} {new.object_name} {new.state.value} by {new.server_id[-4:]}"
        )
        if old is not None and old.done and new != old:
            self._fail(
                f"operation {new.id} ({new.verb}) had ended as {old.state.value} and was changed: {new}"
            )
        if old is not None and (old.verb, old.request_id, old.payload_digest) != (
            new.verb,
            new.request_id,
            new.payload_digest,
        ):
            self._fail(f"operation {new.id} was overwritten by another request")
        if new.request_id:
            first = self.by_request.setdefault((new.principal, new.request_id), new.id)
            if first != new.id:
                self._fail(
                    f"request {new.request_id} of {new.principal} is carried out twice: {first}, {new.id}"
                )
        if new.verb == "create" and new.object_kind == "instance":
            self.made_by[new.id].add(new.object_id)
            if len(self.made_by[new.id]) > 1:
                self._fail(f"create {new.id} (request {new.request_id}) made {sorted(self.made_by[new.id])}")
        self.operations[new.id] = new

    def _instance(self, old: Instance | None, new: Instance) -> None:
        self._trace.add(
            f"instance {new.id[-6:]} {new.name} {new.status.value} ({new.status_reason}) wants {new.desired.value} on "
            f"{new.node_id[-4:]} epoch {new.epoch}"
        )
        if new.id in self.removed:
            self._fail(f"instance {new.name} ({new.id}) was {self.removed[new.id]} and is back")
        if old is None:
            operation = self.operations.get(new.operation_id)
            if operation is None or operation.object_id != new.id or operation.done:
                self._fail(f"instance {new.name} ({new.id}) was made without a create in progress")
            return
        # A commit may hold several decisions, so that what it shows can be two moves.
        by_unknown = can_move(old.status, InstanceStatus.UNKNOWN) and can_move(
            InstanceStatus.UNKNOWN, new.status
        )
        if not can_move(old.status, new.status) and not by_unknown:
            self._fail(f"instance {new.name}: {old.status.value} became {new.status.value}")
        if (new.epoch, new.generation) < (old.epoch, old.generation):
            self._fail(f"instance {new.name}: epoch {old.epoch} became {new.epoch}")
        if new.node_id != old.node_id and new.epoch <= old.epoch:
            self._fail(f"instance {new.name} was placed anew in epoch {old.epoch}")

    def _gone(self, old: Instance) -> None:
        operation = self.operations.get(old.operation_id)
        failed_create = (
            operation is not None
            and operation.verb == "create"
            and (operation.state in (OperationState.FAILED, OperationState.CANCELLED))
        )
        if failed_create:
            self.removed[old.id] = "undone"
        elif old.desired is DesiredState.DELETED:
            self.removed[old.id] = "deleted"
        else:
            self._fail(
                f"instance {old.name} ({old.id}), {old.status.value} and wanted {old.desired.value}, was lost: nobody "
                "had asked for its end"
            )

    def _reserved(self, node_ids: set[str]) -> None:
        sums = dict.fromkeys(sorted(node_ids), (ZERO, 0))
        for instance in self.instances.values():
            if instance.node_id in sums:
                held, count = sums[instance.node_id]
                sums[instance.node_id] = (held + instance.holds, count + 1)
            elsewhere = instance.holds_elsewhere
            if elsewhere is not None and elsewhere[0] in sums:
                held, count = sums[elsewhere[0]]
                sums[elsewhere[0]] = (held + elsewhere[1], count + 1)
        for node_id, (held, count) in sums.items():
            if not node_id:
                continue
            shown = self.allocations.get(node_id) or Allocation(node_id=node_id)
            if (shown.reserved, shown.instances) != (held, count):
                self._fail(
                    f"node {node_id} has {shown.reserved} reserved for {shown.instances} instances; placed on it are "
                    f"{held} of {count}"
                )
            node = self.nodes.get(node_id)
            if node is not None and not held.fits_in(node.capacity):
                self._fail(f"node {node_id} is given more than it has: {held}")

    def check_names(self) -> None:
        """At rest: every name belongs to an instance and every instance has its name."""
        wanted = {keys.name(i.project, i.name).path for i in self.instances.values()}
        if wanted != self.names:
            self._fail(f"names and instances differ: {sorted(wanted ^ self.names)}")


class RuntimeTruth:
    """What really runs, on all machines."""

    def __init__(self, trace: Trace, fail: Callable[[str], None]) -> None:
        self._trace = trace
        self._fail = fail
        self._running: dict[str, dict[str, int]] = defaultdict(dict)
        self.starts: dict[tuple[str, int], int] = defaultdict(int)

    def began(self, machine: str, instance_id: str, epoch: int) -> None:
        """A guest runs."""
        self._trace.add(f"guest {instance_id[-6:]} epoch {epoch} runs on {machine}")
        others = {m: e for m, e in self._running[instance_id].items() if m != machine}
        if others:
            self._fail(f"instance {instance_id} runs twice: epoch {epoch} on {machine}, and {others}")
        self._running[instance_id][machine] = epoch
        self.starts[instance_id, epoch] += 1

    def over(self, machine: str, instance_id: str, epoch: int) -> None:
        """It does not run any more."""
        self._trace.add(f"guest {instance_id[-6:]} epoch {epoch} ended on {machine}")
        self._running[instance_id].pop(machine, None)

    def where(self, instance_id: str) -> dict[str, int]:
        """The machines on which it runs, with the epoch."""
        return self._running.get(instance_id, {})


def violated(what: str) -> None:
    """Raise it."""
    raise Violation(what)
