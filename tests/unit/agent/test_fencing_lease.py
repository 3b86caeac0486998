"""Until when servers count on a node, and what its gate makes of it."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.fencing.contact import CONTACT, Contact, ContactFile, read_contact
from hypervisor.agent.fencing.fence import Fence, NoGuard
from hypervisor.agent.fencing.guard import AFTER_S, is_due
from hypervisor.agent.fencing.killing import processes_of
from hypervisor.agent.fencing.lease import Lease
from hypervisor.agent.fencing.marks import Marks, marked
from hypervisor.core.availability import FencingState
from hypervisor.core.errors import Unavailable

BOOT, OTHER_BOOT = "a" * 36, "b" * 36
ID = "i-01m8ctqndeepdm6hzbwkybxqnc"


class HandClock:
    """Time that a test moves."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def entry(*, stops: bool = True) -> Entry:
    return Entry(
        instance_id=ID,
        driver="fake",
        generation=1,
        epoch=1,
        phase=Phase.READY,
        since=datetime(2030, 1, 1, tzinfo=UTC),
        stops=stops,
    )


def fence(lease: Lease, clock: HandClock, directory: Path, *, enabled: bool = True) -> Fence:
    return Fence(lease, marks=Marks(directory), guard=NoGuard(), clock=clock, enabled=enabled)


def test_the_lease_is_counted_from_when_the_heartbeat_was_sent(tmp_path: Path) -> None:
    clock = HandClock()
    lease = Lease(tmp_path, clock, boot=BOOT)
    lease.registered(1000.0, time_to_live_s=30.0, disarmed=False)
    clock.now_s = 1009.0

    lease.answered(1005.0, time_to_live_s=30.0, disarmed=False)

    assert lease.until_s == 1035.0


def test_a_server_that_is_configured_otherwise_does_not_make_the_lease_longer(tmp_path: Path) -> None:
    lease = Lease(tmp_path, HandClock(), boot=BOOT)
    lease.registered(1000.0, time_to_live_s=30.0, disarmed=False)

    lease.answered(1010.0, time_to_live_s=300.0, disarmed=False)

    assert lease.until_s == 1040.0


@given(beats=st.lists(st.tuples(st.floats(0, 1e6), st.floats(1.0, 120.0)), min_size=1, max_size=20))
def test_the_lease_never_ends_later_than_the_servers(
    tmp_path_factory: pytest.TempPathFactory, beats: list[tuple[float, float]]
) -> None:
    """A server renews when a heartbeat was sent at the earliest; its lease lives as long as it was granted for."""
    clock = HandClock(0.0)
    lease = Lease(tmp_path_factory.mktemp("lease"), clock, boot=BOOT)
    granted_s = beats[0][1]
    servers_until = 0.0
    for number, (sent_s, said_s) in enumerate(sorted(beats)):
        if number == 0:
            granted_s = said_s
            lease.registered(sent_s, time_to_live_s=said_s, disarmed=False)
        else:
            lease.answered(sent_s, time_to_live_s=said_s, disarmed=False)
        servers_until = max(servers_until, sent_s + granted_s)

        assert lease.until_s <= servers_until


def test_an_agent_that_starts_again_goes_on_with_the_lease_of_the_one_before(tmp_path: Path) -> None:
    clock = HandClock()
    before = Lease(tmp_path, clock, boot=BOOT)
    before.registered(1000.0, time_to_live_s=30.0, disarmed=True)
    before.close()

    after = Lease(tmp_path, clock, boot=BOOT)

    assert (after.until_s, after.disarmed, after.rebooted) == (1030.0, True, False)


def test_after_a_reboot_there_is_no_lease(tmp_path: Path) -> None:
    clock = HandClock()
    before = Lease(tmp_path, clock, boot=BOOT)
    before.registered(1000.0, time_to_live_s=30.0, disarmed=False)
    before.close()

    after = Lease(tmp_path, clock, boot=OTHER_BOOT)

    assert not after.held
    assert after.rebooted


@pytest.mark.parametrize(
    "damage", [lambda data: data[:20], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1])]
)
def test_a_contact_that_is_damaged_is_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / CONTACT
    file = ContactFile(path)
    file.write(Contact(BOOT, 12.5, disarmed=True))
    assert read_contact(path) == Contact(BOOT, 12.5, disarmed=True)
    file.close()

    path.write_bytes(damage(path.read_bytes()))

    assert read_contact(path) is None


def test_a_start_is_refused_once_the_lease_has_ended_and_only_of_what_has_to_be_stopped(
    tmp_path: Path,
) -> None:
    clock = HandClock()
    lease = Lease(tmp_path, clock, boot=BOOT)
    lease.registered(1000.0, time_to_live_s=30.0, disarmed=False)
    gate = fence(lease, clock, tmp_path)
    gate.check(entry())

    clock.now_s = 1030.0

    gate.check(entry(stops=False))
    with pytest.raises(Unavailable) as refused:
        gate.check(entry())
    assert refused.value.reason == "NODE_FENCED"
    lease.answered(1029.0, time_to_live_s=30.0, disarmed=False)
    gate.check(entry())


def test_nothing_is_fenced_while_that_is_switched_off(tmp_path: Path) -> None:
    clock = HandClock()
    lease = Lease(tmp_path, clock, boot=BOOT)
    lease.registered(1000.0, time_to_live_s=30.0, disarmed=True)
    clock.now_s = 2000.0
    gate = fence(lease, clock, tmp_path)

    gate.check(entry())

    assert gate.state().state is FencingState.DISARMED


def test_the_state_tells_what_the_fence_does(tmp_path: Path) -> None:
    clock = HandClock()
    lease = Lease(tmp_path, clock, boot=BOOT)
    gate = fence(lease, clock, tmp_path)
    gate.busy = True
    assert gate.state().state is FencingState.FENCING
    gate.busy = False
    assert gate.state().state is FencingState.FENCED
    lease.registered(1000.0, time_to_live_s=30.0, disarmed=False)
    assert gate.state().state is FencingState.ARMED
    assert fence(lease, clock, tmp_path, enabled=False).state().state is FencingState.DISARMED


@pytest.mark.parametrize(
    ("contact", "now_s", "due"),
    [
        (None, 1e9, False),
        (Contact(BOOT, 100.0, disarmed=False), 100.0 + AFTER_S - 0.1, False),
        (Contact(BOOT, 100.0, disarmed=False), 100.0 + AFTER_S, True),
        (Contact(BOOT, 100.0, disarmed=True), 1e9, False),
        (Contact(OTHER_BOOT, 100.0, disarmed=False), 0.0, True),
    ],
)
def test_the_guard_leaves_the_agent_a_moment(contact: Contact | None, now_s: float, due: bool) -> None:
    assert is_due(contact, boot=BOOT, now_s=now_s) is due


def test_marks_are_those_that_were_made_last(tmp_path: Path) -> None:
    assert marked(tmp_path) == frozenset()
    marks = Marks(tmp_path)
    marks.add("i-a")
    marks.add("i-b")
    marks.remove("i-a")
    marks.remove("i-a")
    assert marked(tmp_path) == {"i-b"}

    marks.keep(["i-c", "i-b"])

    assert marked(tmp_path) == {"i-b", "i-c"}


def _process(
    proc: Path, pid: int, *, cgroup: str, command: str, state: str = "S", started_s: int = 50
) -> None:
    directory = proc / str(pid)
    directory.mkdir(parents=True)
    (directory / "cgroup").write_text(cgroup)
    (directory / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    ticks = started_s * os.sysconf("SC_CLK_TCK")
    (directory / "stat").write_text(f"{pid} (a) b) {state} {' '.join('0' * 18)} {ticks} 0 0")


def test_processes_are_found_by_their_control_group_or_as_virtual_machine_monitors(tmp_path: Path) -> None:
    other = ID.replace("0", "9")
    _process(tmp_path, 10, cgroup=f"0::/hypervisor/{ID}\n", command="sh")
    _process(tmp_path, 11, cgroup=f"0::/hypervisor/{ID}\n", command="sh", state="Z")
    _process(tmp_path, 12, cgroup="0::/\n", command=f"/usr/bin/qemu-system-x86_64 -name guest={ID}")
    _process(tmp_path, 13, cgroup="0::/\n", command=f"/usr/bin/containerd-shim-runc-v2 -id {ID}")
    _process(tmp_path, 14, cgroup="0::/\n", command=f"hypervisor-ctl instance stop {ID}")
    _process(tmp_path, 15, cgroup=f"0::/hypervisor/{other}\n", command="sh")
    _process(tmp_path, 16, cgroup=f"0::/hypervisor/{ID}/nested\n", command="")
    _process(tmp_path, 18, cgroup=f"0::/elsewhere/{ID}\n", command="sh", started_s=101)
    (tmp_path / "self").mkdir()
    (tmp_path / "17").mkdir()

    assert processes_of({ID}, started_before_s=100.0, proc=tmp_path) == {10: ID, 12: ID, 16: ID}
