"""The record in a domain's metadata, and what is told of a domain by it and its state."""

from datetime import UTC, datetime

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent.drivers.libvirt.observing import DomainState, Phase, end_of_run, observe
from hypervisor.agent.drivers.libvirt.record import Record, RunEnd
from hypervisor.core.states import InstanceStatus

NOW = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)
# What legal_text lets through. Attributes lose the difference of white space unless it is written by number.
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff")
)
MOMENTS = st.datetimes(timezones=st.just(UTC))
NAMES = st.text("abc0123456789.", min_size=1, max_size=8)
RECORDS = st.builds(
    Record,
    instance_id=TEXT,
    generation=st.integers(1, 1 << 40),
    epoch=st.integers(1, 1 << 40),
    name=TEXT,
    project=TEXT,
    home=TEXT,
    files=st.lists(NAMES, max_size=3).map(tuple),
    image=st.just("") | NAMES,
    has_disk=st.booleans(),
    uefi=st.booleans(),
    accelerator=st.sampled_from(["kvm", "qemu", "test"]),
    accelerator_reason=TEXT,
    started_at=st.none() | MOMENTS,
    stop_asked=st.booleans(),
    end=st.none()
    | st.builds(
        RunEnd,
        exit_code=st.none() | st.integers(0, 255),
        finished_at=MOMENTS,
        reason=st.sampled_from(["EXITED", "KILLED", "VMM_DIED"]),
        requested=st.booleans(),
    ),
)
RECORD = Record(instance_id="i-1", generation=3, epoch=2, name="box", project="default", started_at=NOW)


@given(RECORDS)
def test_a_record_survives_the_metadata(record: Record) -> None:
    assert Record.from_xml(record.to_xml()) == record


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no XML"),
        ("<a", "no XML"),
        ("<instance/>", "attribute id"),
        ('<instance id="i" generation="x"/>', "x"),
    ],
)
def test_damaged_metadata_is_an_error_that_says_what(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Record.from_xml(text)


OFF = libvirt.VIR_DOMAIN_SHUTOFF


@pytest.mark.parametrize(
    ("state", "reason", "saved", "requested", "panicked", "wanted"),
    [
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, False, False, False, ("EXITED", 0)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, False, True, False, ("EXITED", 0)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED, False, True, False, ("KILLED", 137)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_SAVED, True, True, False, ("SUSPENDED", 0)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, False, False, True, ("GUEST_PANIC", None)),
        (libvirt.VIR_DOMAIN_CRASHED, 0, False, False, False, ("GUEST_PANIC", None)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, False, False, False, ("VMM_DIED", None)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_FAILED, False, False, False, ("VMM_DIED", None)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN, False, False, False, ("VM_LOST", None)),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN, False, True, False, ("KILLED", 137)),
    ],
)
def test_how_a_run_ended(
    state: int, reason: int, saved: bool, requested: bool, panicked: bool, wanted: tuple[str, int | None]
) -> None:
    end = end_of_run(DomainState(state, reason, saved), requested=requested, panicked=panicked, now=NOW)

    assert (end.reason, end.exit_code) == wanted


@pytest.mark.parametrize(
    ("state", "reason", "phase"),
    [
        (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, Phase.RUNNING),
        (libvirt.VIR_DOMAIN_BLOCKED, 0, Phase.RUNNING),
        (libvirt.VIR_DOMAIN_SHUTDOWN, 0, Phase.RUNNING),
        (libvirt.VIR_DOMAIN_PMSUSPENDED, 0, Phase.RUNNING),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER, Phase.PAUSED),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR, Phase.PAUSED),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT, Phase.RUNNING),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SAVE, Phase.RUNNING),
        (OFF, 0, Phase.OFF),
        (libvirt.VIR_DOMAIN_CRASHED, 0, Phase.OFF),
    ],
)
def test_what_a_domain_is_doing(state: int, reason: int, phase: Phase) -> None:
    assert DomainState(state, reason).phase is phase


def test_a_guest_that_waits_for_its_disk_is_paused_with_the_reason() -> None:
    state = DomainState(libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)

    seen = observe(RECORD, state, runtime="r", now=NOW)

    assert (seen.status, seen.reason) == (InstanceStatus.PAUSED, "IO_ERROR")
    assert "disk" in seen.message


def test_an_end_that_was_not_asked_for_and_is_no_exit_is_a_failure_with_words() -> None:
    end = RunEnd(exit_code=None, finished_at=NOW, reason="VMM_DIED", requested=False)
    record = Record(
        instance_id="i-1",
        generation=1,
        epoch=1,
        name="",
        project="",
        started_at=NOW,
        end=end,
        accelerator_reason="why",
    )

    seen = observe(record, DomainState(OFF, 0), runtime="r", now=NOW)

    assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "VMM_DIED", None)
    assert "QEMU" in seen.message
    assert seen.runtime_reason == "why"
