"""What a node is to be made to have: one rule a test."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

import pytest
from msgspec import structs

from hypervisor.core.model import Instance, InstanceSpec, Observation, Sizes
from hypervisor.core.moves import MovePhase, MoveRecord, MoveStrategy
from hypervisor.core.resources import ZERO
from hypervisor.core.restarts import RestartCondition, RestartPolicy, Restarts
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType
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
ON_FAILURE = RestartPolicy(condition=RestartCondition.ON_FAILURE)
LASTING = InstanceSpec(image="busybox", restart=ON_FAILURE)


def record(instance_id: str = "i-1", **changes: object) -> Instance:
    made = Instance(
        id=instance_id,
        name=instance_id,
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(image="busybox"),
        status=S.RUNNING,
        desired=DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        started_at=NOW,
        node_id="n-1",
        epoch=3,
        observed_sequence=5,
    )
    return structs.replace(made, **changes)


def seen(instance_id: str = "i-1", status: InstanceStatus = S.RUNNING, **changes: object) -> Observation:
    made = Observation(
        instance_id=instance_id,
        generation=1,
        epoch=3,
        status=status,
        observed_at=NOW,
        sequence=5,
        started_at=NOW,
    )
    return structs.replace(made, **changes)


def actions(
    wanted: Iterable[Instance] = (),
    observed: Iterable[Observation] = (),
    *,
    others: Iterable[Instance] = (),
    deleted: Iterable[str] = (),
    orphans: Mapping[str, float] | None = None,
    working: frozenset[InstanceType] = frozenset(InstanceType),
    records_since: datetime | None = None,
) -> tuple[NodeAction, ...]:
    return reconcile(
        NodeSituation(
            node_id="n-1",
            now=NOW,
            working=working,
            wanted={i.id: i for i in wanted},
            observed={o.instance_id: o for o in observed},
            others={i.id: i for i in others},
            deleted=frozenset(deleted),
            orphans=orphans or {},
            monotonic_s=1000.0,
            orphan_grace_s=600.0,
            records_since=records_since,
        )
    )


def test_nothing_is_done_to_what_is_well() -> None:
    stopped = record("i-2", desired=DesiredState.STOPPED, status=S.STOPPED, started_at=None)

    assert actions([record(), stopped], [seen(), seen("i-2", S.STOPPED, started_at=None)]) == ()


def test_one_that_its_node_lacks_is_lost_or_made_again_as_its_policy_says() -> None:
    assert actions([record()]) == (MarkLost("i-1", 3),)
    assert actions([record(spec=LASTING)]) == (CreateAgain("i-1", 3),)
    assert actions([record(spec=LASTING, desired=DesiredState.STOPPED)]) == (MarkLost("i-1", 3),)


def test_what_is_lost_already_stays_so() -> None:
    assert actions([record(spec=LASTING, status=S.FAILED, status_reason="LOST")]) == ()


def test_one_whose_driver_does_not_work_is_not_taken_for_missing() -> None:
    assert actions([record(spec=LASTING)], working=frozenset()) == ()


@pytest.mark.parametrize("changes", [{"operation_id": "op-1"}, {"desired": DesiredState.DELETED}])
def test_what_somebody_is_at_is_left_to_him(changes: dict[str, object]) -> None:
    assert actions([record(**changes)]) == ()
    assert actions([record(**changes)], [seen(status=S.STOPPED, epoch=2)]) == ()


def test_an_older_copy_of_what_is_placed_here_is_removed() -> None:
    for old in (seen(epoch=2), seen(generation=1)):
        (action,) = actions([record(generation=2)], [old])
        assert isinstance(action, DeleteCopy)
        assert action.seen == old
        assert not action.unknown


def test_a_record_follows_a_placement_that_it_never_heard_of() -> None:
    newer = seen(epoch=4)

    assert actions([record()], [newer]) == (TakeIn(newer),)
    assert actions([], [newer], others=[record(node_id="n-2")]) == (TakeIn(newer),)


def test_a_copy_of_a_later_specification_than_recorded_is_kept() -> None:
    (action,) = actions([record()], [seen(generation=2)])

    assert isinstance(action, KeepOrphan)


def test_a_copy_of_a_move_that_came_to_nothing_is_removed() -> None:
    back = record(node_id="n-2", last_epoch=4)

    (action,) = actions([], [seen(epoch=4)], others=[back])

    assert isinstance(action, DeleteCopy)


def test_what_a_move_is_about_is_left_to_it() -> None:
    move = MoveRecord(
        source="n-1",
        source_epoch=3,
        target="n-2",
        target_epoch=4,
        held=ZERO,
        strategy=MoveStrategy.REPLACE,
        phase=MovePhase.CLEANING,
        started_at=NOW,
    )

    assert actions([], [seen()], others=[record(node_id="n-2", epoch=4, move=move)]) == ()
    assert actions([record(spec=LASTING, move=move)]) == ()


def test_what_the_record_does_not_know_is_taken_in() -> None:
    ended = seen(status=S.FAILED, sequence=6, exit_code=3, reason="EXITED", finished_at=NOW)

    assert actions([record()], [ended]) == (TakeIn(ended),)


def test_one_that_runs_and_shall_not_is_stopped() -> None:
    told = record(desired=DesiredState.STOPPED)

    assert actions([told], [seen()]) == (Stop("i-1", 3),)


def test_an_agent_that_does_not_know_the_policy_is_told() -> None:
    assert actions([record(spec=LASTING)], [seen()]) == (Adopt("i-1", 3),)
    assert actions([record(spec=LASTING, restarts=Restarts())], [seen(restarts=Restarts())]) == ()


@pytest.mark.parametrize(
    ("restarts", "exit_code", "reason", "started"),
    [
        (Restarts(), 3, "EXITED", True),
        (Restarts(next_at=NOW), 3, "BACKOFF", False),
        (Restarts(exhausted=True), 3, "RESTARTS_EXHAUSTED", False),
        (Restarts(), 0, "EXITED", False),
        (Restarts(), 137, "SUSPENDED", False),
    ],
)
def test_one_that_its_node_does_nothing_about_is_started(
    restarts: Restarts, exit_code: int, reason: str, started: bool
) -> None:
    status = S.FAILED if exit_code else S.STOPPED
    known = record(
        spec=LASTING,
        status=status,
        status_reason=reason,
        exit_code=exit_code,
        finished_at=NOW,
        restarts=restarts,
    )
    end = seen(status=status, reason=reason, exit_code=exit_code, finished_at=NOW, restarts=restarts)

    assert (Start("i-1", 3) in actions([known], [end])) is started


def test_one_that_its_runtime_lost_is_made_again_as_its_policy_says() -> None:
    gone = seen(status=S.FAILED, reason="RUNTIME_LOST", started_at=None, restarts=Restarts())

    assert CreateAgain("i-1", 3) in actions([record(spec=LASTING)], [gone])
    assert CreateAgain("i-1", 3) not in actions([record()], [gone])


def test_sizes_that_nobody_knows_are_settled() -> None:
    unsure = record(resizing=Sizes(cpu_millis=2000, memory_mb=512))

    assert actions([unsure], [seen()]) == (GiveSizes("i-1", 3),)


def test_a_copy_that_was_placed_elsewhere_since_is_removed() -> None:
    (action,) = actions([], [seen(epoch=2)], others=[record(node_id="n-2")])

    assert isinstance(action, DeleteCopy)
    assert not action.unknown


def test_a_copy_here_that_is_as_new_as_the_record_elsewhere_is_kept() -> None:
    (action,) = actions([], [seen()], others=[record(node_id="n-2")])

    assert isinstance(action, KeepOrphan)


def test_one_that_came_here_meanwhile_or_is_on_its_way_is_left_alone() -> None:
    assert actions([], [seen()], others=[record()]) == ()
    assert actions([], [seen(epoch=2)], others=[record(node_id="n-2", operation_id="op-1")]) == ()


def test_one_without_a_record_is_kept_for_its_grace_and_then_removed() -> None:
    for orphans, kind in (
        ({}, KeepOrphan),
        ({"i-1": 401.0}, KeepOrphan),
        ({"i-1": 400.0}, DeleteCopy),
    ):
        (action,) = actions([], [seen()], orphans=orphans)
        assert isinstance(action, kind)


def test_one_whose_deletion_is_on_record_is_removed_at_once() -> None:
    (action,) = actions([], [seen()], deleted=["i-1"])

    assert isinstance(action, DeleteCopy)
    assert action.unknown


@pytest.mark.parametrize(
    ("started_at", "kind"),
    [
        (NOW - timedelta(seconds=1), KeepOrphan),
        (None, KeepOrphan),
        (NOW + timedelta(seconds=1), DeleteCopy),
    ],
)
def test_one_without_a_record_that_is_older_than_the_store_or_its_restore_is_kept_for_good(
    started_at: datetime | None, kind: type[NodeAction]
) -> None:
    (action,) = actions([], [seen(started_at=started_at)], orphans={"i-1": 0.0}, records_since=NOW)

    assert isinstance(action, kind)
