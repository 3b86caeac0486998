"""Whatever the records want and whatever a node has: the reconciler's actions, carried out on a model of both, bring
them together in a few looks, remove nothing that is wanted, and never make a second copy."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from hypervisor.core.model import Instance, InstanceSpec, Observation, Sizes
from hypervisor.core.restarts import RestartCondition, RestartPolicy, Restarts
from hypervisor.core.states import ACTIVE, DesiredState, InstanceStatus, InstanceType
from hypervisor.server.observations import fold, lost
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

NOW = datetime(2030, 1, 1, tzinfo=UTC)
S = InstanceStatus
HERE, THERE = "n-1", "n-2"
LOOKS = 5
GRACE_S = 600.0
IDS = ("i-1", "i-2", "i-3")

policies = st.none() | st.builds(
    RestartPolicy, condition=st.sampled_from((RestartCondition.ON_FAILURE, RestartCondition.ALWAYS))
)
records = st.builds(
    Instance,
    id=st.just(""),
    name=st.just("web"),
    project=st.just("default"),
    type=st.just(InstanceType.CONTAINER),
    spec=st.builds(InstanceSpec, restart=policies),
    status=st.sampled_from((S.RUNNING, S.STOPPED, S.FAILED, S.UNKNOWN, S.PAUSED)),
    status_reason=st.sampled_from(("", "LOST", "EXITED")),
    desired=st.sampled_from((DesiredState.RUNNING, DesiredState.STOPPED, DesiredState.DELETED)),
    created_at=st.just(NOW),
    updated_at=st.just(NOW),
    node_id=st.sampled_from((HERE, HERE, THERE)),
    generation=st.integers(1, 2),
    epoch=st.integers(1, 3),
    last_epoch=st.sampled_from((0, 0, 3, 4)),
    operation_id=st.sampled_from(("", "", "op-1")),
    observed_sequence=st.integers(0, 9),
    resizing=st.none() | st.just(Sizes(cpu_millis=2000, memory_mb=512)),
)
copies = st.builds(
    Observation,
    instance_id=st.just(""),
    generation=st.integers(1, 2),
    epoch=st.integers(1, 5),
    status=st.sampled_from((S.RUNNING, S.STOPPED, S.FAILED, S.PAUSED)),
    observed_at=st.just(NOW),
    sequence=st.integers(10, 19),
    reason=st.sampled_from(("", "EXITED", "RUNTIME_LOST", "SUSPENDED")),
    exit_code=st.none() | st.integers(0, 3),
    restarts=st.none() | st.builds(Restarts, next_at=st.none() | st.just(NOW), exhausted=st.booleans()),
)


@dataclass
class World:
    """The records, and what one node has."""

    records: dict[str, Instance]
    copies: dict[str, Observation]
    deleted: frozenset[str]
    monotonic_s: float = 0.0
    orphans: dict[str, float] = field(default_factory=dict)
    sequence: int = 100

    def situation(self) -> NodeSituation:
        wanted = {i: r for i, r in self.records.items() if r.node_id == HERE}
        return NodeSituation(
            node_id=HERE,
            now=NOW,
            working=frozenset(InstanceType),
            wanted=wanted,
            observed=dict(self.copies),
            others={i: r for i, r in self.records.items() if i not in wanted},
            deleted=self.deleted,
            orphans=self.orphans,
            monotonic_s=self.monotonic_s,
            orphan_grace_s=GRACE_S,
        )

    def look(self) -> tuple[NodeAction, ...]:
        actions = reconcile(self.situation())
        since = self.orphans
        kept = {a.seen.instance_id for a in actions if isinstance(a, KeepOrphan)}
        self.orphans = {i: since.get(i, self.monotonic_s) for i in kept}
        for action in actions:
            self.carry_out(action, since)
        self.monotonic_s += GRACE_S
        return actions

    def show(self, instance_id: str, **changes: object) -> None:
        """The agent brings its copy into a state, and the record takes it in."""
        self.sequence += 1
        shown = structs.replace(self.copies[instance_id], sequence=self.sequence, **changes)
        self.copies[instance_id] = shown
        taken = fold(self.records[instance_id], shown, now=NOW)
        if taken is not None:
            self.records[instance_id] = taken

    def carry_out(self, action: NodeAction, since: Mapping[str, float]) -> None:
        match action:
            case TakeIn(seen) if seen.epoch >= self.records[seen.instance_id].next_epoch:
                # As adopt_placement does it.
                self.records[seen.instance_id] = structs.replace(
                    self.records[seen.instance_id],
                    node_id=HERE,
                    epoch=seen.epoch,
                    generation=max(self.records[seen.instance_id].generation, seen.generation),
                    observed_sequence=0,
                )
            case TakeIn(seen):
                taken = fold(self.records[seen.instance_id], seen, now=NOW)
                assert taken is not None
                self.records[seen.instance_id] = taken
            case DeleteCopy(seen):
                self.check_unwanted(seen, since)
                del self.copies[seen.instance_id]
            case MarkLost(instance_id):
                gone = lost(self.records[instance_id], now=NOW)
                if gone is not None:
                    self.records[instance_id] = gone
            case CreateAgain(instance_id, epoch):
                self.create_again(instance_id, epoch)
            case Adopt(instance_id):
                self.show(instance_id, restarts=Restarts())
            case Start(instance_id):
                assert self.records[instance_id].desired is DesiredState.RUNNING
                self.show(instance_id, status=S.RUNNING, reason="", exit_code=None)
            case Stop(instance_id):
                assert self.records[instance_id].desired is DesiredState.STOPPED
                self.show(instance_id, status=S.STOPPED, reason="EXITED", exit_code=0)
            case GiveSizes(instance_id):
                self.records[instance_id] = structs.replace(self.records[instance_id], resizing=None)
            case KeepOrphan():
                pass

    def create_again(self, instance_id: str, epoch: int) -> None:
        record, copy = self.records[instance_id], self.copies.get(instance_id)
        assert record.desired is DesiredState.RUNNING
        assert record.node_id == HERE
        assert record.epoch == epoch
        # In place of what is left of a lost one at most: no second copy.
        assert copy is None or copy.reason == "RUNTIME_LOST"
        self.records[instance_id] = structs.replace(
            record, epoch=record.next_epoch, status=S.CREATING, observed_sequence=0
        )
        self.copies[instance_id] = Observation(
            instance_id=instance_id,
            generation=record.generation,
            epoch=self.records[instance_id].epoch,
            status=S.CREATING,
            observed_at=NOW,
        )
        self.show(instance_id, status=S.RUNNING, restarts=Restarts())

    def check_unwanted(self, seen: Observation, since: Mapping[str, float]) -> None:
        """No record wants this copy here, nor one that may be older than it is."""
        record = self.records.get(seen.instance_id)
        if record is None:
            known_s = self.monotonic_s - since.get(seen.instance_id, self.monotonic_s)
            assert seen.instance_id in self.deleted or known_s >= GRACE_S
            return
        assert not record.operation_id
        undone = record.epoch < seen.epoch <= record.last_epoch and record.node_id != HERE
        assert undone or (seen.epoch, seen.generation) < (record.epoch, record.generation)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    known = {i: structs.replace(draw(records), id=i) for i in IDS if draw(st.booleans())}
    there = {i: structs.replace(draw(copies), instance_id=i) for i in IDS if draw(st.booleans())}
    return World(known, there, frozenset(draw(st.sets(st.sampled_from(IDS)))))


def settled(world: World, record: Instance) -> bool:
    """Whether the node has of this record what it wants, or it is known why not."""
    copy = world.copies.get(record.id)
    if copy is None:
        return record.status is S.FAILED and record.status_reason == "LOST"
    if copy.epoch > record.epoch or copy.generation > record.generation:
        return copy.epoch <= max(record.epoch, record.last_epoch)  # else the record follows
    same = (copy.epoch, copy.generation) == (record.epoch, record.generation)
    idle = record.desired is not DesiredState.STOPPED or copy.status not in ACTIVE
    return same and idle


@settings(deadline=None, max_examples=200)
@given(worlds())
def test_a_few_looks_bring_records_and_node_together(world: World) -> None:
    for _ in range(LOOKS):
        actions = world.look()
        if not actions:
            break

    assert all(isinstance(action, KeepOrphan) for action in world.look())
    for record in world.records.values():
        if record.node_id == HERE and not record.operation_id and record.desired is not DesiredState.DELETED:
            assert settled(world, record), (record, world.copies.get(record.id))
    for instance_id, copy in world.copies.items():
        known = world.records.get(instance_id)
        assert known is not None, "what has no record is removed after its grace"
        assert known.node_id == HERE or known.operation_id or known.epoch <= copy.epoch


@settings(deadline=None, max_examples=100)
@given(worlds())
def test_records_of_what_is_wanted_stay(world: World) -> None:
    before = dict(world.records)

    for _ in range(LOOKS):
        world.look()

    assert world.records.keys() == before.keys()
    for instance_id, record in world.records.items():
        assert record.desired is before[instance_id].desired
        adopted = record.epoch > before[instance_id].epoch and record.node_id == HERE
        assert adopted or record.node_id == before[instance_id].node_id
        if before[instance_id].operation_id:
            assert record == before[instance_id]


@settings(deadline=None, max_examples=50)
@given(worlds())
def test_a_restored_store_costs_no_guest_within_the_grace(world: World) -> None:
    empty = replace(world, records={}, deleted=frozenset())
    there = dict(empty.copies)

    assert all(isinstance(action, KeepOrphan) for action in empty.look())
    assert empty.copies == there
