"""What is decided about lost nodes: who is placed elsewhere, who waits, and when nothing is moved at all."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from hypervisor.core.availability import (
    Availability,
    FencingState,
    InstanceLoss,
    NodeFencing,
    NodeLoss,
    OnNodeLoss,
    OnPartition,
)
from hypervisor.core.model import Instance, InstanceSpec, Node
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType, NodeStatus
from hypervisor.server.reconcile.losses import (
    Forget,
    HoldMoves,
    LossAction,
    LossLimits,
    LossSituation,
    Replace,
    Start,
    brake,
    decide_losses,
    may_replace,
    why_not,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
S = InstanceStatus
RESCHEDULE = Availability(on_node_loss=OnNodeLoss.RESCHEDULE, on_partition=OnPartition.STOP)
ARMED = NodeFencing(state=FencingState.ARMED)
LIMITS = LossLimits()


def node(
    node_id: str = "n-1", *, lost: bool = True, zone: str = "a", ago_s: float = 60.0, **changes: object
) -> Node:
    made = Node(
        id=node_id,
        hostname=node_id,
        address="a",
        port=1,
        created_at=NOW,
        updated_at=NOW,
        zone=zone,
        status=NodeStatus.OFFLINE if lost else NodeStatus.READY,
        fencing=ARMED,
        loss=NodeLoss(since=NOW - timedelta(seconds=ago_s)) if lost else None,
    )
    return structs.replace(made, **changes)


def instance(instance_id: str = "i-1", status: InstanceStatus = S.UNKNOWN, **changes: object) -> Instance:
    made = Instance(
        id=instance_id,
        name=instance_id,
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(availability=RESCHEDULE),
        status=status,
        status_reason="NODE_LOST",
        desired=DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        node_id="n-1",
        lost=InstanceLoss(since=NOW, node_id="n-1"),
    )
    return structs.replace(made, **changes)


def decided(
    nodes: Iterable[Node],
    instances: Iterable[Instance],
    *,
    fenced: Iterable[str] = ("n-1",),
    moving: int = 0,
    waiting: Iterable[str] = (),
    limits: LossLimits = LIMITS,
) -> tuple[LossAction, ...]:
    waits = set(waiting)
    return decide_losses(
        LossSituation(
            now=NOW,
            nodes=list(nodes),
            fenced=set(fenced),
            instances=list(instances),
            moving=moving,
            waits=lambda instance_id: instance_id in waits,
        ),
        limits,
    )


def test_an_instance_of_a_lost_and_fenced_node_is_replaced_where_it_asks_for_it() -> None:
    assert decided([node()], [instance()]) == (Replace(instance()),)
    assert decided([node()], [instance()], fenced=()) == ()
    assert decided([node()], [instance()], waiting=["i-1"]) == ()
    assert decided([node(disarmed="switched off")], [instance()]) == ()
    assert decided([node(fencing=None)], [instance()]) == ()
    for unasked in (Availability(), Availability(on_partition=OnPartition.STOP), None):
        assert decided([node()], [instance(spec=InstanceSpec(availability=unasked))]) == ()


def test_only_what_should_run_and_is_held_by_nothing_is_replaced() -> None:
    assert decided([node()], [instance(operation_id="op-1")]) == ()
    assert decided([node()], [instance(desired=DesiredState.STOPPED)]) == ()
    assert decided([node()], [instance(desired=DesiredState.DELETED)]) == ()
    assert decided([node()], [instance(lost=None)]) == ()
    assert decided([node()], [instance(status=S.RUNNING)]) == ()


def test_a_dead_node_is_emptied_whatever_the_policies() -> None:
    dead = node(loss=NodeLoss(since=NOW, evacuated_by="alice"), fencing=None)
    plain = instance(spec=InstanceSpec(), lost=None, desired=DesiredState.STOPPED)
    assert decided([dead], [plain], fenced=()) == (Replace(plain),)
    going = instance(desired=DesiredState.DELETED, status=S.DELETING)
    assert decided([dead], [going]) == (Forget("i-1"),)


def test_no_more_are_begun_than_may_move_at_once() -> None:
    many = [instance(f"i-{n}") for n in range(5)]
    assert len(decided([node()], many, limits=LossLimits(max_moves=3))) == 3
    assert len(decided([node()], many, moving=2, limits=LossLimits(max_moves=3))) == 1
    assert decided([node()], many, moving=9, limits=LossLimits(max_moves=3)) == ()


def test_what_a_loss_ended_is_started_again_on_a_node_that_is_back() -> None:
    back = node(lost=False)
    fenced = instance(status=S.FAILED, status_reason="FENCED", lost=None)
    assert decided([back], [fenced]) == (Start(fenced),)
    assert decided([node()], [fenced]) == ()
    assert decided([back], [structs.replace(fenced, desired=DesiredState.STOPPED)]) == ()
    restarted = instance(status=S.STOPPED, status_reason="NODE_RESTARTED", lost=None)
    assert decided([back], [restarted]) == (Start(restarted),)
    never = structs.replace(restarted, spec=InstanceSpec())
    assert decided([back], [never]) == ()


def test_one_that_could_not_be_made_on_its_new_node_is_placed_again() -> None:
    for reason in ("REPLACE_FAILED", "LOST"):
        failed = instance(status=S.FAILED, status_reason=reason)
        assert decided([node(lost=False)], [failed]) == (Replace(failed),)
    assert decided([node(lost=False)], [instance(status=S.FAILED, status_reason="EXITED")]) == ()


def test_more_than_the_share_of_a_zone_holds_the_losses_until_somebody_decides() -> None:
    nodes = [node("n-1"), node("n-2"), node("n-3", lost=False)]
    (held,) = decided(nodes, [instance()])
    assert isinstance(held, HoldMoves)
    assert "2 of 3 nodes of zone a" in held.why
    marked = [node("n-1", loss=NodeLoss(since=NOW, held=held.why)), *nodes[1:]]
    assert decided(marked, [instance()]) == ()
    assert why_not(marked[0], instance(), fenced=True) == held.why
    dead = [node("n-1", loss=NodeLoss(since=NOW, evacuated_by="alice")), *nodes[1:]]
    assert decided(dead, [instance()]) == (Replace(instance()),)


def test_the_whole_cluster_counts_where_zones_are_small() -> None:
    zones = [node("n-1", zone="a"), node("n-2", zone="b"), node("n-3", zone="c", lost=False)]
    assert "2 of 3 nodes of the cluster" in brake(zones[0], zones, now=NOW, limits=LIMITS)
    two = [node("n-1", zone="a"), node("n-2", zone="a", lost=False)]
    assert brake(two[0], two, now=NOW, limits=LIMITS) == ""


def test_nodes_lost_long_ago_do_not_hold_later_losses() -> None:
    old = [node(f"o-{n}", ago_s=3600.0) for n in range(5)]
    here = [node(f"h-{n}", lost=False) for n in range(3)]
    assert brake(node("n-1"), [node("n-1"), *old, *here], now=NOW, limits=LIMITS) == ""
    still_held = [structs.replace(o, loss=NodeLoss(since=o.loss.since, held="x")) for o in old if o.loss]
    assert brake(node("n-1"), [node("n-1"), *still_held, *here], now=NOW, limits=LIMITS)


@given(
    losses=st.lists(
        st.tuples(st.booleans(), st.sampled_from("ab"), st.floats(0, 2000), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    fenced_count=st.integers(0, 12),
    moving=st.integers(0, 5),
    max_moves=st.integers(1, 5),
)
def test_whatever_is_lost_nothing_is_replaced_that_may_still_run(
    losses: list[tuple[bool, str, float, bool, bool]], fenced_count: int, moving: int, max_moves: int
) -> None:
    nodes = [
        node(
            f"n-{n}",
            lost=lost,
            zone=zone,
            ago_s=ago_s,
            fencing=ARMED if armed else None,
            disarmed="off" if off else "",
        )
        for n, (lost, zone, ago_s, armed, off) in enumerate(losses)
    ]
    instances = [
        instance(f"i-{n}", node_id=one.id, status=S.UNKNOWN if one.loss else S.RUNNING)
        for n, one in enumerate(nodes)
    ]
    fenced = {f"n-{n}" for n in range(fenced_count)}
    limits = LossLimits(max_moves=max_moves)

    actions = decided(nodes, instances, fenced=fenced, moving=moving, limits=limits)

    replaced = [action.instance for action in actions if isinstance(action, Replace)]
    held = {action.node_id for action in actions if isinstance(action, HoldMoves)}
    assert len(replaced) <= max(max_moves - moving, 0)
    by_id = {one.id: one for one in nodes}
    for one in replaced:
        where = by_id[one.node_id]
        assert where.loss is not None
        assert where.id in fenced
        assert where.fencing is not None
        assert not where.disarmed
        assert where.id not in held
        assert brake(where, nodes, now=NOW, limits=limits) == ""
        assert may_replace(one, where, fenced=True)
