"""What the leader decides to do."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from msgspec import structs

from hypervisor.core.images import Image, ImageDeletion, ImageKind, ImageState
from hypervisor.core.model import Instance, InstanceSpec, Node, OperationRecord
from hypervisor.core.moves import MovePhase, MoveRecord, MoveStrategy
from hypervisor.core.states import (
    DesiredState,
    InstanceStatus,
    InstanceType,
    NodeStatus,
    OperationState,
)
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

NOW = datetime(2030, 1, 1, tzinfo=UTC)
S = InstanceStatus


def node(node_id: str = "n-1", *, status: NodeStatus = NodeStatus.READY) -> Node:
    return Node(
        id=node_id, hostname=node_id, address="a", port=1, created_at=NOW, updated_at=NOW, status=status
    )


def instance(status: InstanceStatus = S.RUNNING, **changes: object) -> Instance:
    made = Instance(
        id="i-1",
        name="web",
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(),
        status=status,
        desired=DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        node_id="n-1",
    )
    return structs.replace(made, **changes)


def operation(**changes: object) -> OperationRecord:
    made = OperationRecord(
        id="op-1",
        verb="create",
        object_kind="instance",
        object_id="i-1",
        object_name="web",
        principal="alice",
        started_at=NOW,
        server_id="s-1",
    )
    return structs.replace(made, **changes)


def decided(
    *,
    nodes: Iterable[Node] = (),
    alive: tuple[str, ...] = ("n-1",),
    instances: Iterable[Instance] = (),
    operations: Iterable[OperationRecord] = (),
    servers: tuple[str, ...] = ("s-1",),
    images: Iterable[Image] = (),
) -> tuple[Action, ...]:
    return decide(
        Situation(
            now=NOW,
            nodes=nodes,
            nodes_alive=alive,
            instances=instances,
            operations=operations,
            servers_alive=servers,
            retention=timedelta(hours=24),
            patience=timedelta(seconds=60),
            images=images,
        )
    )


def test_nothing_is_done_to_what_is_well() -> None:
    assert decided(nodes=[node()], instances=[instance()], operations=[operation()]) == ()


def test_a_node_without_a_lease_is_offline() -> None:
    assert decided(nodes=[node()], alive=()) == (MarkNodeOffline("n-1"),)
    assert decided(nodes=[node(status=NodeStatus.OFFLINE)], alive=()) == ()


def test_instances_of_an_offline_node_are_unknown() -> None:
    offline = [node(status=NodeStatus.OFFLINE)]
    assert decided(nodes=offline, instances=[instance()], alive=()) == (MarkUnknown("i-1"),)
    known = instance(S.UNKNOWN, status_reason="NODE_LOST")
    assert decided(nodes=offline, instances=[known], alive=()) == ()
    for_another_reason = instance(S.UNKNOWN, status_reason="NODE_UNREACHABLE")
    assert decided(nodes=offline, instances=[for_another_reason], alive=()) == (MarkUnknown("i-1"),)
    held = instance(S.STOPPING, operation_id="op-1")
    assert decided(nodes=offline, instances=[held], alive=()) == ()


def test_what_is_unknown_on_a_living_node_is_looked_at_once_per_node() -> None:
    unsure = [instance(S.UNKNOWN), instance(S.STOPPING, id="i-2")]
    assert decided(nodes=[node()], instances=unsure) == (InspectNode("n-1"),)


def test_what_shall_be_gone_is_removed_when_its_node_is_there() -> None:
    leftover = instance(S.DELETING, desired=DesiredState.DELETED)
    assert decided(nodes=[node()], instances=[leftover]) == (RemoveLeftover("i-1"),)
    assert decided(nodes=[node(status=NodeStatus.OFFLINE)], instances=[leftover], alive=()) == ()


def test_operations_of_dead_servers_are_driven_on() -> None:
    assert decided(operations=[operation()], servers=()) == (RedriveOperation("op-1"),)


def test_operations_long_past_their_deadline_are_driven_on() -> None:
    late = instance(operation_id="op-1", transition_deadline=NOW - timedelta(seconds=61))
    just = instance(operation_id="op-1", transition_deadline=NOW - timedelta(seconds=59))
    assert decided(nodes=[node()], instances=[late], operations=[operation()]) == (RedriveOperation("op-1"),)
    assert decided(nodes=[node()], instances=[just], operations=[operation()]) == ()


def test_ended_operations_are_kept_for_their_time() -> None:
    ended = operation(state=OperationState.FAILED, finished_at=NOW - timedelta(hours=25))
    kept = operation(state=OperationState.FAILED, finished_at=NOW - timedelta(hours=23))
    assert decided(operations=[ended], servers=()) == (PurgeOperation("op-1"),)
    assert decided(operations=[kept], servers=()) == ()


def moved(**changes: object) -> Instance:
    """On n-2, with an old copy on n-1 that is not removed yet."""
    move = MoveRecord(
        strategy=MoveStrategy.REPLACE,
        phase=MovePhase.CLEANING,
        source="n-1",
        source_epoch=1,
        target="n-2",
        target_epoch=2,
        started_at=NOW,
    )
    return instance(node_id="n-2", epoch=2, move=move, **changes)


def test_what_a_move_left_is_removed_once_its_node_is_there() -> None:
    both = {"alive": ("n-1", "n-2")}
    offline = [node("n-1", status=NodeStatus.OFFLINE), node("n-2")]

    assert decided(nodes=[node("n-1"), node("n-2")], instances=[moved()], **both) == (RemoveOldCopy("i-1"),)
    assert decided(nodes=offline, instances=[moved()], alive=("n-2",)) == ()
    assert decided(nodes=[node("n-2")], instances=[moved()], alive=("n-2",)) == ()
    # Whoever moves it does that.
    assert decided(nodes=[node("n-1"), node("n-2")], instances=[moved(operation_id="op-1")], **both) == ()


def test_drains_are_nobodys_to_redrive() -> None:
    assert decided(operations=[operation(verb="drain", server_id="s-dead")]) == ()


def image(deletion: ImageDeletion | None, state: ImageState = ImageState.DELETING) -> Image:
    return Image(
        id="img-1",
        name="linux",
        project="default",
        kind=ImageKind.KERNEL,
        format="bzimage",
        size_bytes=1,
        sha256="0" * 64,
        created_at=NOW,
        state=state,
        deletion=deletion,
    )


def test_a_delete_of_an_image_is_finished_when_its_server_is_dead_or_takes_too_long() -> None:
    begun = ImageDeletion(operation=operation(verb="delete", object_kind="image", object_id="img-1"))
    late = ImageDeletion(operation=operation(started_at=NOW - timedelta(seconds=61)))

    assert decided(images=[image(begun)]) == ()
    assert decided(images=[image(None, ImageState.READY)]) == ()
    assert decided(images=[image(begun)], servers=()) == (FinishImageDelete("img-1"),)
    assert decided(images=[image(late)]) == (FinishImageDelete("img-1"),)
    # As an earlier version has left it.
    assert decided(images=[image(None)]) == (FinishImageDelete("img-1"),)
