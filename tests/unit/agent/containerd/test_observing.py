"""What the platform is told of a container."""

from datetime import UTC, datetime, timedelta

import pytest

from hypervisor.agent.drivers.containerd.labels import Record, RunEnd
from hypervisor.agent.drivers.containerd.observing import (
    TaskPhase,
    TaskState,
    end_of_run,
    observe,
    parse_signal,
)
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

START = datetime(2026, 1, 2, 3, 4, 5, 600000, tzinfo=UTC)
END = START + timedelta(seconds=90)


def record(*, started: bool = True, end: RunEnd | None = None) -> Record:
    return Record(
        instance_id="i-1",
        generation=3,
        epoch=2,
        name="box",
        project="default",
        stop_signal=15,
        cpu_millis=250,
        started_at=START if started else None,
        end=end,
    )


def ended(exit_code: int, *, reason: str = "EXITED", requested: bool = False) -> RunEnd:
    return RunEnd(exit_code=exit_code, finished_at=END, reason=reason, requested=requested)


def look(of: Record, task: TaskState | None = None) -> Observation:
    return observe(of, task, runtime="containerd 1.6.20", now=END)


@pytest.mark.parametrize(
    "full", [record(started=False), record(), record(end=ended(0)), record(end=ended(137, requested=True))]
)
def test_a_record_survives_being_written_as_labels(full: Record) -> None:
    assert Record.from_labels(full.to_labels()) == full


@pytest.mark.parametrize("damage", [{"hypervisor/epoch": "x"}, {"hypervisor/started-at": "yesterday"}])
def test_damaged_labels_are_an_error(damage: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Record.from_labels(record().to_labels() | damage)


def test_missing_labels_are_named() -> None:
    labels = record().to_labels()
    del labels["hypervisor/generation"]

    with pytest.raises(ValueError, match="hypervisor/generation"):
        Record.from_labels(labels)


def test_a_running_task_is_running_whatever_the_last_run_was() -> None:
    seen = look(record(end=ended(1)), TaskState(phase=TaskPhase.RUNNING, pid=1))

    assert (seen.status, seen.exit_code, seen.finished_at) == (InstanceStatus.RUNNING, None, None)
    assert (seen.generation, seen.epoch, seen.started_at) == (3, 2, START)


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        (ended(0), InstanceStatus.STOPPED, "EXITED"),
        (ended(7), InstanceStatus.FAILED, "EXITED"),
        (ended(137, reason="OOM_KILLED"), InstanceStatus.FAILED, "OOM_KILLED"),
        (ended(143, reason="KILLED"), InstanceStatus.FAILED, "KILLED"),
        (ended(143, reason="KILLED", requested=True), InstanceStatus.STOPPED, "KILLED"),
        (ended(7, requested=True), InstanceStatus.STOPPED, "EXITED"),
    ],
)
def test_an_ended_run_is_a_failure_unless_it_was_asked_for_or_went_well(
    end: RunEnd, status: InstanceStatus, reason: str
) -> None:
    seen = look(record(end=end))

    assert (seen.status, seen.reason, seen.exit_code) == (status, reason, end.exit_code)
    assert seen.message
    assert seen.finished_at == END


def test_a_container_that_never_ran_is_stopped_without_a_reason() -> None:
    seen = look(record(started=False))

    assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "", None)


def test_a_run_whose_task_is_gone_without_a_trace_has_failed() -> None:
    assert (look(record()).status, look(record()).reason) == (InstanceStatus.FAILED, "TASK_LOST")


@pytest.mark.parametrize(
    ("exit_code", "oom_kills", "requested", "reason"),
    [
        (0, 0, False, "EXITED"),
        (1, 1, False, "EXITED"),
        (137, 1, False, "OOM_KILLED"),
        (137, 0, False, "KILLED"),
        (137, 1, True, "KILLED"),
        (143, 0, False, "KILLED"),
        (255, 0, False, "EXITED"),
    ],
)
def test_the_reason_follows_from_exit_code_and_oom_kills(
    exit_code: int, oom_kills: int, requested: bool, reason: str
) -> None:
    end = end_of_run(exit_code, END, oom_kills=oom_kills, requested=requested, now=END)

    assert end.reason == reason


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("SIGQUIT", 3),
        ("9", 9),
        ("SIGRTMIN+3", 15),
        ("999", 15),
        ("0", 15),
        ("", 15),
    ],
)
def test_stop_signals_are_read_by_name_or_number(text: str, number: int) -> None:
    assert parse_signal(text) == number
