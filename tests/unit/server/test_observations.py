"""Observations folded into records."""

from datetime import UTC, datetime

import pytest
from msgspec import structs

from hypervisor.core.model import SEQUENCE_BITS, Instance, InstanceSpec, Observation
from hypervisor.core.restarts import Restarts
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType
from hypervisor.server.observations import fold, lost, missing, settle

NOW = datetime(2030, 1, 1, tzinfo=UTC)
S = InstanceStatus


def instance(status: InstanceStatus = S.RUNNING, **changes: object) -> Instance:
    made = Instance(
        id="i-1",
        name="web",
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(image="busybox"),
        status=status,
        desired=DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        node_id="n-1",
        observed_sequence=5,
    )
    return structs.replace(made, **changes)


def seen(status: InstanceStatus, *, sequence: int = 6, **changes: object) -> Observation:
    made = Observation(
        instance_id="i-1", generation=1, epoch=1, status=status, observed_at=NOW, sequence=sequence
    )
    return structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (0, "EXITED", (S.STOPPED, "EXITED")),
        (1, "EXITED", (S.FAILED, "EXITED")),
        (137, "OOM_KILLED", (S.FAILED, "OOM_KILLED")),
        (137, "KILLED", (S.FAILED, "KILLED")),
        (2, "", (S.FAILED, "EXITED")),
    ],
)
def test_an_end_nobody_asked_for(code: int, reason: str, expected: tuple[InstanceStatus, str]) -> None:
    after = fold(instance(), seen(S.STOPPED, exit_code=code, reason=reason), now=NOW)

    assert after is not None
    assert (after.status, after.status_reason) == expected
    assert after.exit_code == code
    assert after.observed_sequence == 6


def test_an_end_that_was_asked_for_is_stopped_whatever_its_exit_code() -> None:
    stopping = instance(S.STOPPING, desired=DesiredState.STOPPED, operation_id="op-1")
    after = fold(stopping, seen(S.FAILED, exit_code=137, reason="KILLED"), now=NOW)

    assert after is not None
    assert (after.status, after.operation_id) == (S.STOPPED, "op-1")


@pytest.mark.parametrize(
    "older",
    [
        seen(S.STOPPED, sequence=5, exit_code=0),
        seen(S.STOPPED, epoch=0, exit_code=0),
        seen(S.STOPPED, generation=0, exit_code=0),
    ],
)
def test_older_observations_are_ignored(older: Observation) -> None:
    assert fold(instance(), older, now=NOW) is None


def test_a_fresh_agents_word_counts_whatever_its_sequence() -> None:
    known = instance(observed_sequence=7 << SEQUENCE_BITS)
    after = fold(known, seen(S.STOPPED, sequence=1, exit_code=0), now=NOW, authoritative=True)
    assert after is not None
    assert (after.status, after.observed_sequence) == (S.STOPPED, 1)


def test_a_registration_does_not_overwrite_what_its_agent_answered_since() -> None:
    """Seed 170: an agent that came back was asked to restart an instance while its registration was under way."""
    answered = instance(observed_sequence=(3 << SEQUENCE_BITS) + 9)
    registered = seen(S.FAILED, sequence=(3 << SEQUENCE_BITS) + 4, exit_code=137)
    assert fold(answered, registered, now=NOW, authoritative=True) is None


def test_what_is_unknown_is_learned_from_a_repeated_observation() -> None:
    unknown = instance(S.UNKNOWN)
    assert fold(unknown, seen(S.RUNNING, sequence=4), now=NOW) is None
    after = fold(unknown, seen(S.RUNNING, sequence=5), now=NOW)
    assert after is not None
    assert after.status is S.RUNNING


def test_an_operation_in_progress_is_not_disturbed() -> None:
    assert fold(instance(S.STOPPING, operation_id="op-1"), seen(S.RUNNING), now=NOW) is None


def test_a_deleted_instance_is_left_to_its_removal() -> None:
    deleting = instance(S.DELETING, desired=DesiredState.DELETED)
    assert fold(deleting, seen(S.STOPPED, exit_code=0), now=NOW) is None


def test_illegal_moves_are_not_made() -> None:
    assert fold(instance(S.PENDING), seen(S.PAUSED), now=NOW) is None


def test_steps_on_the_way_are_not_recorded() -> None:
    assert fold(instance(S.STOPPED), seen(S.CREATING), now=NOW) is None


def test_the_cause_of_a_failure_outlives_the_agents_next_report() -> None:
    failed = instance(S.FAILED, status_reason="START_FAILED")
    assert fold(failed, seen(S.STOPPED), now=NOW) is None


def test_an_answer_ends_the_operation() -> None:
    after = settle(instance(S.SCHEDULED, operation_id="op-1"), seen(S.RUNNING, runtime="r 1"), now=NOW)
    assert (after.status, after.operation_id, after.runtime) == (S.RUNNING, "", "r 1")


def test_an_end_that_overtook_the_answer_stands() -> None:
    ended = instance(S.FAILED, status_reason="EXITED", exit_code=1, observed_sequence=7, operation_id="op-1")
    after = settle(ended, seen(S.RUNNING, sequence=6), now=NOW)
    assert (after.status, after.exit_code, after.operation_id) == (S.FAILED, 1, "")


def test_an_answer_that_ends_nothing_does_not_leave_the_instance_on_its_way() -> None:
    after = settle(instance(S.SCHEDULED, operation_id="op-1"), seen(S.CREATING), now=NOW)
    assert (after.status, after.status_reason, after.operation_id) == (S.FAILED, "UNSETTLED", "")


def test_an_instance_its_node_does_not_have_is_lost() -> None:
    after = lost(instance(), now=NOW)
    assert after is not None
    assert (after.status, after.status_reason) == (S.FAILED, "LOST")
    assert lost(after, now=NOW) is None


def test_an_instance_its_node_did_not_name_is_not_known() -> None:
    after = missing(instance(), now=NOW)
    assert after is not None
    assert (after.status, after.status_reason) == (S.UNKNOWN, "NOT_REPORTED")
    assert missing(after, now=NOW) is None


@pytest.mark.parametrize(
    "left_alone",
    [
        instance(S.SCHEDULED, operation_id="op-1"),
        instance(S.DELETING, desired=DesiredState.DELETED),
    ],
)
def test_instances_under_way_are_not_lost(left_alone: Instance) -> None:
    assert lost(left_alone, now=NOW) is None
    assert missing(left_alone, now=NOW) is None


def test_a_restart_by_the_node_is_taken_in_with_its_count() -> None:
    waiting = Restarts(count=1, total=1, next_at=NOW)
    failed = fold(instance(), seen(S.FAILED, exit_code=3, reason="BACKOFF", restarts=waiting), now=NOW)
    assert failed is not None
    assert (failed.status, failed.status_reason, failed.restarts) == (S.FAILED, "BACKOFF", waiting)

    done = Restarts(count=2, total=2, last_at=NOW)
    again = fold(failed, seen(S.RUNNING, sequence=7, restarts=done), now=NOW)

    assert again is not None
    assert (again.status, again.status_reason, again.exit_code, again.restarts) == (S.RUNNING, "", None, done)


def test_an_agent_that_knows_no_restarts_leaves_them_as_they_are() -> None:
    known = Restarts(count=1, total=1)

    after = fold(instance(restarts=known), seen(S.STOPPED, exit_code=0), now=NOW)

    assert after is not None
    assert after.restarts == known
