"""Numbering of observations, and what proves that an action cut off took place."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from hypervisor.agent.drivers.actions import took_place
from hypervisor.agent.drivers.observed import ObservationBook
from hypervisor.agent.entries import Entry, Phase
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BEFORE, AFTER = NOW - timedelta(seconds=1), NOW + timedelta(seconds=1)


def seen(status: InstanceStatus = InstanceStatus.RUNNING, started_at: datetime | None = None) -> Observation:
    return Observation(
        instance_id="i", generation=1, epoch=1, status=status, observed_at=NOW, started_at=started_at
    )


def test_every_news_gets_a_higher_sequence() -> None:
    book = ObservationBook(starts=1)

    first, first_new = book.record(seen())
    second, second_new = book.record(seen(InstanceStatus.STOPPED))

    assert (first_new, second_new) == (True, True)
    assert second.sequence > first.sequence > 0


def test_the_same_seen_later_is_no_news_and_keeps_its_sequence() -> None:
    book = ObservationBook(starts=1)
    first, _ = book.record(seen())

    again, new = book.record(msgspec.structs.replace(seen(), observed_at=AFTER))

    assert (again, new) == (first, False)


def test_sequences_rise_over_starts_of_the_agent() -> None:
    early, late = ObservationBook(starts=1), ObservationBook(starts=2)
    for number in range(1000):
        last, _ = early.record(msgspec.structs.replace(seen(), message=str(number)))

    first, _ = late.record(seen())

    assert first.sequence > last.sequence
    assert ObservationBook(starts=1 << 26).record(seen())[0].sequence < 1 << 63


def test_events_are_counted_and_answers_are_not() -> None:
    book = ObservationBook(starts=1)

    book.record(seen())
    book.event(seen(InstanceStatus.STOPPED))
    book.event(seen(InstanceStatus.STOPPED))

    assert book.events_of("i") == 2
    assert book.events_of("other") == 0


def test_what_is_forgotten_is_gone() -> None:
    book = ObservationBook(starts=1)
    book.record(seen())

    book.forget("i")

    assert book.newest("i") is None


def test_what_is_seen_again_is_newer_and_otherwise_the_same() -> None:
    book = ObservationBook(starts=1)
    first, _ = book.record(seen())

    book.renumber(AFTER)

    again = book.newest("i")
    assert again is not None
    assert again.sequence > first.sequence
    assert again == msgspec.structs.replace(first, sequence=again.sequence, observed_at=AFTER)


@pytest.mark.parametrize(
    ("phase", "start", "observation", "proof"),
    [
        (Phase.CREATING, True, seen(started_at=BEFORE), True),
        (Phase.CREATING, True, seen(InstanceStatus.FAILED, BEFORE), True),
        (Phase.CREATING, True, seen(InstanceStatus.STOPPED), False),
        (Phase.CREATING, False, seen(InstanceStatus.STOPPED), False),
        (Phase.STARTING, False, seen(started_at=AFTER), True),
        (Phase.STARTING, False, seen(started_at=BEFORE), False),
        (Phase.STARTING, False, seen(InstanceStatus.STOPPED), False),
        (Phase.RESTARTING, False, seen(started_at=BEFORE), False),
        (Phase.RESTARTING, False, seen(InstanceStatus.FAILED, AFTER), True),
        (Phase.STOPPING, False, seen(InstanceStatus.STOPPED, BEFORE), True),
        (Phase.STOPPING, False, seen(InstanceStatus.FAILED, BEFORE), True),
        (Phase.STOPPING, False, seen(started_at=BEFORE), False),
        (Phase.DELETING, False, seen(InstanceStatus.STOPPED), False),
        (Phase.UNDOING, False, seen(InstanceStatus.STOPPED), False),
    ],
)
def test_what_proves_that_an_action_took_place(
    phase: Phase, start: bool, observation: Observation, proof: bool
) -> None:
    entry = Entry(instance_id="i", driver="fake", generation=1, epoch=1, phase=phase, since=NOW, start=start)

    assert took_place(entry, observation) is proof
