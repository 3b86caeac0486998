"""What a drain does next, case by case, and how budgets stand."""

from datetime import UTC, datetime, timedelta

import pytest
from msgspec import structs

from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import ErrorRecord, Instance, InstanceSpec, LabelConstraint, Node, OperationRecord
from hypervisor.core.moves import MovePhase, MovePolicy, MoveRecord, MoveStrategy
from hypervisor.core.resources import Resources
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType, NodeStatus, OperationState
from hypervisor.server.draining.budgets import available, standing
from hypervisor.server.draining.records import Budget, DrainKind, DrainOrder, DrainRecord, Trouble
from hypervisor.server.draining.stepping import Situation, StartMove, StopByForce, failed_attempt, step
from hypervisor.server.live_moves import NoLiveMoves
from hypervisor.server.moving import plan_strategy

NOW = datetime(2030, 1, 1, tzinfo=UTC)
S = InstanceStatus
CONTAINER, VM, MICROVM = InstanceType.CONTAINER, InstanceType.VM, InstanceType.MICROVM


def node(node_id: str = "n-1", *, status: NodeStatus = NodeStatus.READY) -> Node:
    return Node(
        id=node_id, hostname=node_id, address="a", port=1, created_at=NOW, updated_at=NOW, status=status
    )


def instance(name: str = "web", status: InstanceStatus = S.RUNNING, **changes: object) -> Instance:
    made = Instance(
        id=f"i-{name}",
        name=name,
        project="default",
        type=CONTAINER,
        spec=InstanceSpec(image="busybox"),
        status=status,
        desired=DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        node_id="n-1",
        labels={"app": "web"},
    )
    return structs.replace(made, **changes)


def drain(kind: DrainKind = DrainKind.DRAIN, **changes: object) -> DrainRecord:
    made = DrainRecord(
        node_id="n-1",
        kind=kind,
        operation_id="op-0",
        principal="alice",
        order=DrainOrder(parallel=2),
        started_at=NOW,
        give_up_at=NOW + timedelta(minutes=10),
    )
    return structs.replace(made, **changes)


def situation(record: DrainRecord, *instances: Instance, **changes: object) -> Situation:
    given: dict[str, object] = {
        "now": NOW,
        "drain": record,
        "nodes": {n: node(n) for n in ("n-1", "n-2")},
        "instances": instances,
        "operations": {},
        "budgets": (),
        "live_refused": NoLiveMoves().why_not,
    }
    return Situation(**{**given, **changes})  # type: ignore[arg-type]


def budget(**limit: int) -> Budget:
    selector = (LabelConstraint(key="app", values=("web",)),)
    return Budget(project="default", name="web", selector=selector, created_at=NOW, **limit)


def replaced(phase: MovePhase, *, strategy: MoveStrategy = MoveStrategy.REPLACE) -> MoveRecord:
    return MoveRecord(
        strategy=strategy,
        phase=phase,
        source="n-1",
        source_epoch=1,
        target="n-2",
        target_epoch=2,
        started_at=NOW,
        runs=True,
        held=Resources(),
    )


def begun(found: Situation) -> list[str]:
    return [action.instance_id for action in step(found).actions]


def test_as_many_are_begun_as_may_be_at_once() -> None:
    decided = step(situation(drain(), instance("a"), instance("b"), instance("c")))

    assert [a.instance_id for a in decided.actions] == ["i-a", "i-b"]
    assert decided.waiting["i-c"].message == "2 are moved at once: it waits for its turn"


def test_one_that_failed_waits_and_lets_the_others_go_first() -> None:
    trouble = Trouble(attempts=1, message="no", not_before=NOW - timedelta(seconds=1))
    record = drain(troubles={"i-a": trouble})

    assert begun(situation(record, instance("a"), instance("b"), instance("c"))) == ["i-b", "i-c"]
    later = structs.replace(trouble, not_before=NOW + timedelta(seconds=1))
    assert begun(situation(drain(troubles={"i-a": later}), instance("a"))) == []


def test_a_failed_move_is_noted_and_tried_ever_later() -> None:
    failed = OperationRecord(
        id="op-1",
        verb="move",
        object_kind="instance",
        object_id="i-a",
        object_name="a",
        principal="p",
        started_at=NOW,
        state=OperationState.FAILED,
        error=ErrorRecord(kind="Unavailable", reason="X", message="the node is busy"),
    )
    record = drain(moving={"i-a": "op-1"})
    decided = step(situation(record, instance("a"), operations={"op-1": failed}))

    assert decided.drain.moving == {}
    assert decided.drain.troubles["i-a"].message == "the node is busy"
    pauses = []
    trouble: Trouble | None = None
    for _ in range(8):
        trouble = failed_attempt(trouble, "m", "X", now=NOW)
        pauses.append((trouble.not_before - NOW).total_seconds())
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]


def test_an_instance_that_another_operation_holds_waits_for_it() -> None:
    decided = step(situation(drain(), instance("a", operation_id="op-9")))

    assert decided.actions == ()
    assert "held by operation op-9" in decided.waiting["i-a"].message
    assert decided.drain.active


def test_a_paused_instance_waits_until_it_is_resumed() -> None:
    decided = step(situation(drain(), instance("a", S.PAUSED)))

    assert "its memory would be lost" in decided.waiting["i-a"].message
    assert decided.drain.active


def test_what_can_never_go_ends_the_drain_with_the_reason() -> None:
    machine = instance("vm", type=VM, spec=InstanceSpec(image="/srv/vm.raw", disk_gb=4))
    decided = step(situation(drain(), machine))

    assert decided.drain.state is OperationState.FAILED
    assert "its disk of 4 GiB" in decided.drain.message
    allowed = drain(order=DrainOrder(allow_disk_loss=True))
    assert begun(situation(allowed, machine)) == ["i-vm"]


def test_the_strategy_of_the_call_wins_over_the_specification() -> None:
    order = DrainOrder(strategies={CONTAINER: MoveStrategy.STOP})
    (action,) = step(situation(drain(order=order), instance())).actions

    assert isinstance(action, StartMove)
    assert action.order.strategy is MoveStrategy.STOP
    assert action.order.keep_home


def test_time_over_ends_it_with_what_is_left() -> None:
    record = drain(troubles={"i-a": Trouble(attempts=3, message="no node fits", not_before=NOW)})
    decided = step(situation(record, instance("a"), instance("b"), now=NOW + timedelta(minutes=10)))

    assert decided.drain.state is OperationState.FAILED
    assert decided.drain.message == "2 instances (a, b) could not be moved in 600 s: no node fits"


def test_past_the_deadline_what_runs_is_stopped_by_force_whatever_the_budget_says() -> None:
    record = drain(force_at=NOW)
    found = situation(record, instance("a"), instance("b", S.STOPPED), budgets=(budget(min_available=5),))
    decided = step(found)

    assert decided.actions == (StopByForce("i-a"),)


def test_the_return_waits_for_a_ready_home_and_takes_only_its_own() -> None:
    own, foreign = instance("a", node_id="n-2", home="n-1"), instance("b", node_id="n-2")
    decided = step(situation(drain(DrainKind.RESTORE), own, foreign))
    (action,) = decided.actions
    assert isinstance(action, StartMove)
    assert (action.instance_id, action.order.node) == ("i-a", "n-1")

    nodes = {"n-1": node(status=NodeStatus.MAINTENANCE), "n-2": node("n-2")}
    decided = step(situation(drain(DrainKind.RESTORE), own, nodes=nodes))
    assert decided.waiting["i-a"].message == "its home is not ready"


def test_what_a_move_left_on_the_node_has_to_go_before_it_is_drained() -> None:
    moved = instance("a", node_id="n-2", epoch=2, move=replaced(MovePhase.CLEANING))
    decided = step(situation(drain(), moved))

    assert decided.drain.active
    assert decided.waiting["i-a"].message == "its old copy is being removed"


@pytest.mark.parametrize(
    ("limit", "running", "allowed"),
    [
        ({"max_unavailable": 1}, 3, 1),
        ({"max_unavailable": 1}, 2, 0),
        ({"max_unavailable": 0}, 3, 0),
        ({"min_available": 2}, 3, 1),
        ({"min_available": 3}, 3, 0),
        ({"min_available": 5}, 3, 0),
    ],
)
def test_a_budget_counts_what_does_not_run_as_away(limit: dict[str, int], running: int, allowed: int) -> None:
    members = [instance(f"r{n}") for n in range(running)]
    members += [instance(f"f{n}", S.FAILED) for n in range(3 - running)]

    stands = standing(budget(**limit), members)

    assert (stands.members, stands.available, stands.allowed) == (3, running, allowed)


def test_a_budget_does_not_count_what_its_user_has_stopped_nor_what_others_own() -> None:
    counted = instance("a")
    stopped = instance("b", S.STOPPED, desired=DesiredState.STOPPED)
    others = [instance("c", project="other"), instance("d", labels={"app": "db"})]

    assert standing(budget(min_available=1), [counted, stopped, *others]).members == 1


def test_an_instance_that_is_replaced_counts_as_there() -> None:
    assert available(instance(status=S.MIGRATING, move=replaced(MovePhase.STARTING)))
    stopping = replaced(MovePhase.STOPPING, strategy=MoveStrategy.STOP)
    assert not available(instance(status=S.MIGRATING, move=stopping))
    assert not available(instance(status=S.MIGRATING, move=replaced(MovePhase.UNDOING)))


def test_a_budget_keeps_a_single_copy_by_replacing_it_and_refuses_to_stop_it() -> None:
    held = (budget(min_available=1),)
    assert begun(situation(drain(), instance(), budgets=held)) == ["i-web"]
    order = DrainOrder(strategies={CONTAINER: MoveStrategy.STOP})
    decided = step(situation(drain(order=order), instance(), budgets=held))
    assert decided.actions == ()
    assert decided.waiting["i-web"].message == ("budget web lets no more go: 1 of 1 run, at least 1 have to")


@pytest.mark.parametrize(
    ("kind", "refused", "strategy"),
    [
        (CONTAINER, "never", MoveStrategy.REPLACE),
        (MICROVM, "never", MoveStrategy.REPLACE),
        (VM, "", MoveStrategy.LIVE),
        (MICROVM, "", MoveStrategy.LIVE),
        (VM, "not here", MoveStrategy.STOP),
    ],
)
def test_each_type_has_its_way(kind: InstanceType, refused: str, strategy: MoveStrategy) -> None:
    policy = MovePolicy(allow_disk_loss=True)

    assert plan_strategy(instance(type=kind), policy, live_refused=refused) is strategy


def test_what_does_not_run_has_no_memory_to_take_along() -> None:
    policy = MovePolicy(allow_disk_loss=True)

    assert plan_strategy(instance(status=S.STOPPED, type=VM), policy, live_refused="") is MoveStrategy.STOP
    with pytest.raises(FailedPrecondition, match="no memory to take along"):
        plan_strategy(
            instance(status=S.STOPPED, type=VM), MovePolicy(strategy=MoveStrategy.LIVE), live_refused=""
        )


def test_a_machine_without_a_disk_loses_nothing() -> None:
    diskless = instance(type=MICROVM, spec=InstanceSpec(kernel_path="/srv/vmlinux"))

    assert plan_strategy(diskless, MovePolicy(), live_refused="never") is MoveStrategy.REPLACE


def test_a_live_move_that_cannot_be_done_is_refused_with_the_reason() -> None:
    with pytest.raises(FailedPrecondition, match="cannot be moved live: not here") as refused:
        plan_strategy(instance(type=VM), MovePolicy(strategy=MoveStrategy.LIVE), live_refused="not here")

    assert refused.value.reason == "LIVE_MOVE_UNAVAILABLE"
