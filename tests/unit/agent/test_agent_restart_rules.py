"""What a restart policy makes of what is seen of an instance."""

import random
from datetime import UTC, datetime, timedelta

import pytest
from msgspec import structs

from hypervisor.agent.drivers.restart_rules import judge
from hypervisor.agent.entries import Entry, Phase
from hypervisor.core.model import Observation
from hypervisor.core.restarts import RestartCondition, RestartPolicy, Restarts
from hypervisor.core.states import InstanceStatus

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
ON_FAILURE = RestartPolicy(condition=RestartCondition.ON_FAILURE)
ALWAYS = RestartPolicy(condition=RestartCondition.ALWAYS)


def entry(policy: RestartPolicy | None = ON_FAILURE, **changes: object) -> Entry:
    base = Entry(
        instance_id="i",
        driver="fake",
        generation=1,
        epoch=1,
        phase=Phase.READY,
        since=NOW,
        restart=policy,
        runs=True,
    )
    return structs.replace(base, **changes)


def ended(exit_code: int | None = 3, *, reason: str = "EXITED", ran_s: float = 2.0) -> Observation:
    failed = exit_code != 0
    return Observation(
        instance_id="i",
        generation=1,
        epoch=1,
        status=InstanceStatus.FAILED if failed else InstanceStatus.STOPPED,
        observed_at=NOW,
        reason=reason,
        message="it ended",
        exit_code=exit_code,
        started_at=NOW - timedelta(seconds=ran_s),
        finished_at=NOW,
    )


def judged(known: Entry, seen: Observation, *, now: datetime = NOW) -> tuple[Entry, Observation]:
    return judge(known, seen, now=now, rng=random.Random(1))


def test_a_failure_waits_for_its_restart_and_says_when() -> None:
    after, told = judged(entry(), ended())

    assert after.restarts.next_at is not None
    assert NOW + timedelta(seconds=0.5) <= after.restarts.next_at <= NOW + timedelta(seconds=1)
    assert (told.status, told.reason) == (InstanceStatus.FAILED, "BACKOFF")
    assert "restart 1 is due at 12:00:0" in told.message
    assert told.restarts == after.restarts
    assert (after.restarts.last_reason, after.restarts.last_exit_code) == ("EXITED", 3)


def test_the_same_end_is_decided_once() -> None:
    once, told = judged(entry(), ended())

    again, told_again = judged(once, ended(), now=NOW + timedelta(seconds=9))

    assert (again, told_again) == (once, told)


def test_what_was_told_before_is_told_the_same_again() -> None:
    once, told = judged(entry(), ended())

    assert judged(once, told) == (once, told)


@pytest.mark.parametrize(
    ("policy", "seen", "restarted"),
    [
        (ON_FAILURE, ended(0), False),
        (ON_FAILURE, ended(3), True),
        (ON_FAILURE, ended(137, reason="OOM_KILLED"), True),
        (ON_FAILURE, ended(None, reason="TASK_LOST"), True),
        (ON_FAILURE, ended(None, reason="RUNTIME_LOST"), False),
        (ALWAYS, ended(0), True),
        (ALWAYS, ended(0, reason="SUSPENDED"), False),
        (ALWAYS, ended(0, reason="RESTORED"), False),
        (None, ended(3), False),
    ],
)
def test_which_ends_the_policy_is_about(
    policy: RestartPolicy | None, seen: Observation, restarted: bool
) -> None:
    after, told = judged(entry(policy), seen)

    assert (after.restarts.next_at is not None) is restarted
    assert (told.reason == "BACKOFF") is restarted


@pytest.mark.parametrize(
    "known",
    [
        entry(runs=False),
        *(entry(phase=phase) for phase in Phase if phase is not Phase.READY),
    ],
)
def test_what_is_not_wanted_to_run_or_is_in_the_midst_of_an_action_is_left_alone(known: Entry) -> None:
    after, told = judged(known, ended())

    assert after == known
    assert told.reason == "EXITED"


def test_the_wait_doubles_up_to_the_longest() -> None:
    policy = RestartPolicy(condition=RestartCondition.ALWAYS, initial_delay_s=1.0, max_delay_s=10.0)

    assert [policy.delay_s(count, 1.0) for count in (0, 1, 2, 3, 4, 500)] == [1, 2, 4, 8, 10, 10]
    assert [policy.delay_s(count, 0.0) for count in (0, 1, 500)] == [0.5, 1, 5]


def test_past_the_limit_it_is_failed_for_good() -> None:
    policy = structs.replace(ALWAYS, max_restarts=2)
    known = entry(policy, restarts=Restarts(count=2, total=2, last_at=NOW - timedelta(seconds=3)))

    after, told = judged(known, ended(0))

    assert after.restarts.exhausted
    assert after.restarts.next_at is None
    assert (told.status, told.reason) == (InstanceStatus.FAILED, "RESTARTS_EXHAUSTED")
    assert "2 times in a row" in told.message


def test_a_long_run_resets_the_count_but_not_the_total() -> None:
    known = entry(restarts=Restarts(count=7, total=9, last_at=NOW - timedelta(seconds=400)))

    after, _ = judged(known, ended(ran_s=399.0))

    assert (after.restarts.count, after.restarts.total) == (0, 9)


def test_a_restart_that_came_to_no_run_does_not_count_the_long_run_before_it_again() -> None:
    known = entry(restarts=Restarts(count=7, total=7, last_at=NOW - timedelta(seconds=1)))

    after, _ = judged(known, ended(ran_s=4000.0))

    assert after.restarts.count == 7


def test_one_that_runs_after_all_waits_for_nothing() -> None:
    known, _ = judged(entry(), ended())
    running = structs.replace(ended(), status=InstanceStatus.RUNNING, exit_code=None, reason="", message="")

    after, told = judged(known, running)

    assert after.restarts.next_at is None
    assert told.reason == ""
