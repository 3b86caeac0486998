"""What holds for all drains: budgets and parallelism are kept at every moment, and every drain ends and says why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from hypervisor.core.model import ErrorRecord, Instance, InstanceSpec, LabelConstraint, Node, OperationRecord
from hypervisor.core.moves import MovePhase, MovePolicy, MoveRecord, MoveStrategy
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType, OperationState
from hypervisor.server.draining.budgets import available, covers, standing
from hypervisor.server.draining.records import Budget, DrainKind, DrainOrder, DrainRecord
from hypervisor.server.draining.stepping import Situation, StartMove, StopByForce, step
from hypervisor.server.live_moves import NoLiveMoves
from hypervisor.server.moving import plan_strategy

NOW = datetime(2030, 1, 1, tzinfo=UTC)
S = InstanceStatus


def node(node_id: str) -> Node:
    return Node(id=node_id, hostname=node_id, address="a", port=1, created_at=NOW, updated_at=NOW)


def instance(
    number: int,
    *,
    node_id: str = "n-1",
    status: InstanceStatus = S.RUNNING,
    label: str = "web",
    strategy: MoveStrategy = MoveStrategy.STOP,
    kind: InstanceType = InstanceType.CONTAINER,
) -> Instance:
    return Instance(
        id=f"i-{number}",
        name=f"i{number}",
        project="default",
        type=kind,
        spec=InstanceSpec(image="busybox", move=MovePolicy(strategy=strategy)),
        status=status,
        desired=DesiredState.STOPPED if status is S.STOPPED else DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        labels={"app": label},
        node_id=node_id,
    )


def budget(name: str, **limit: int) -> Budget:
    return Budget(
        project="default",
        name=name,
        selector=(LabelConstraint(key="app", values=(name,)),),
        created_at=NOW,
        **limit,
    )


@dataclass
class World:
    """A cluster that does what a drain asks for; what fails is chosen by the test."""

    drain: DrainRecord
    instances: dict[str, Instance]
    budgets: tuple[Budget, ...]
    now: datetime = NOW
    cancelled: bool = False
    operations: dict[str, OperationRecord] = field(default_factory=dict)

    def situation(self) -> Situation:
        return Situation(
            now=self.now,
            drain=self.drain,
            nodes={n: node(n) for n in ("n-1", "n-2")},
            instances=self.instances.values(),
            operations=self.operations,
            budgets=self.budgets,
            live_refused=NoLiveMoves().why_not,
            cancelled=self.cancelled,
        )

    def carry_out(self) -> None:
        """Look, and begin all that is to be begun."""
        decided = step(self.situation())
        self.drain = decided.drain
        for action in decided.actions:
            self._begin(action)
        if decided.drain.active:
            assert len(self.drain.moving) <= self.drain.order.parallel

    def _begin(self, action: StartMove | StopByForce) -> None:
        moved = self.instances[action.instance_id]
        operation = OperationRecord(
            id=f"op-{len(self.operations)}",
            verb="move" if isinstance(action, StartMove) else "stop",
            object_kind="instance",
            object_id=moved.id,
            object_name=moved.name,
            principal="p",
            started_at=self.now,
        )
        self.operations[operation.id] = operation
        self.drain = structs.replace(self.drain, moving={**self.drain.moving, moved.id: operation.id})
        changed = structs.replace(moved, operation_id=operation.id)
        if isinstance(action, StopByForce):
            changed = structs.replace(changed, status=S.STOPPING)
        else:
            strategy = plan_strategy(moved, action.order.policy(moved), live_refused="never")
            stops = strategy is MoveStrategy.STOP
            changed = structs.replace(
                changed,
                status=S.MIGRATING,
                move=MoveRecord(
                    strategy=strategy,
                    phase=MovePhase.STOPPING if stops else MovePhase.STARTING,
                    source=moved.node_id,
                    source_epoch=moved.epoch,
                    target="n-2",
                    target_epoch=moved.next_epoch,
                    started_at=self.now,
                    runs=moved.status is S.RUNNING,
                ),
            )
        self.instances[moved.id] = changed

    def end(self, operation_id: str, *, fails: bool) -> None:
        """An operation ends."""
        operation = self.operations[operation_id]
        if operation.done:
            return
        moved = self.instances[operation.object_id]
        error = ErrorRecord(kind="Unavailable", reason="NO", message="it failed") if fails else None
        self.operations[operation_id] = structs.replace(
            operation,
            state=OperationState.FAILED if fails else OperationState.SUCCEEDED,
            error=error,
            finished_at=self.now,
        )
        runs = moved.move.runs if moved.move is not None else False
        if operation.verb == "stop":
            status = S.RUNNING if fails else S.STOPPED
            wanted = moved.desired if fails else DesiredState.STOPPED
            moved = structs.replace(moved, status=status, desired=wanted)
        else:
            moved = structs.replace(
                moved,
                status=S.RUNNING if runs else S.STOPPED,
                node_id=moved.node_id if fails else "n-2",
                move=None,
            )
        self.instances[moved.id] = structs.replace(moved, operation_id="")

    def under_way(self) -> list[str]:
        return [o.id for o in self.operations.values() if not o.done]


def drain_record(order: DrainOrder) -> DrainRecord:
    force_at = None if order.force_after_s is None else NOW + timedelta(seconds=order.force_after_s)
    return DrainRecord(
        node_id="n-1",
        kind=DrainKind.DRAIN,
        operation_id="op-drain",
        principal="p",
        order=order,
        started_at=NOW,
        give_up_at=NOW + timedelta(seconds=order.timeout_s),
        force_at=force_at,
    )


limits = st.one_of(
    st.integers(0, 3).map(lambda n: {"max_unavailable": n}),
    st.integers(0, 5).map(lambda n: {"min_available": n}),
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    count = draw(st.integers(0, 8))
    instances: dict[str, Instance] = {}
    for number in range(count):
        made = instance(
            number,
            node_id=draw(st.sampled_from(["n-1", "n-1", "n-2"])),
            status=draw(st.sampled_from([S.RUNNING, S.RUNNING, S.RUNNING, S.STOPPED, S.FAILED, S.PAUSED])),
            label=draw(st.sampled_from(["web", "db"])),
            strategy=draw(st.sampled_from([MoveStrategy.STOP, MoveStrategy.REPLACE, MoveStrategy.LIVE])),
        )
        instances[made.id] = made
    budgets = tuple(budget(name, **draw(limits)) for name in draw(st.sets(st.sampled_from(["web", "db"]))))
    order = DrainOrder(
        timeout_s=100.0,
        parallel=draw(st.integers(1, 4)),
        force_after_s=draw(st.sampled_from([None, 50.0])),
    )
    return World(drain_record(order), instances, budgets)


def taken_away(world: World, limits_before: Mapping[str, int]) -> None:
    """Assert that the drain has taken away no more than its budgets let."""
    if world.drain.force_at is not None and world.now >= world.drain.force_at:
        return
    for one in world.budgets:
        members = [i for i in world.instances.values() if covers(one, i)]
        up = sum(map(available, members))
        floor = (
            one.min_available if one.min_available is not None else len(members) - (one.max_unavailable or 0)
        )
        # Where fewer ran from the start the drain has to leave it at that.
        assert up >= min(floor, limits_before[one.name])


@given(worlds(), st.data())
def test_a_drain_keeps_to_its_limits_and_ends(world: World, data: st.DataObject) -> None:
    before = {one.name: standing(one, world.instances.values()).available for one in world.budgets}
    for _ in range(80):
        world.carry_out()
        taken_away(world, before)
        if not world.drain.active:
            break
        for operation_id in world.under_way():
            if data.draw(st.booleans()):
                world.end(operation_id, fails=data.draw(st.booleans()))
        world.now += timedelta(seconds=2)

    assert not world.drain.active
    assert world.drain.message
    if world.drain.state is OperationState.SUCCEEDED:
        left = [i for i in world.instances.values() if i.node_id == "n-1"]
        running = [i for i in left if i.status not in (S.STOPPED, S.FAILED)]
        forced = world.drain.force_at is not None and world.now >= world.drain.force_at
        assert (running if forced else left) == []


@given(worlds())
def test_a_look_changes_nothing_by_itself(world: World) -> None:
    first = step(world.situation())
    second = step(structs_situation(world, first.drain))

    assert second.drain == first.drain
    if first.drain.active:
        assert second.actions == first.actions


def structs_situation(world: World, drain: DrainRecord) -> Situation:
    world.drain = drain
    return world.situation()


@given(worlds())
def test_a_cancelled_drain_begins_nothing(world: World) -> None:
    world.cancelled = True
    decided = step(world.situation())

    assert decided.actions == ()
    assert decided.drain.state is OperationState.CANCELLED
