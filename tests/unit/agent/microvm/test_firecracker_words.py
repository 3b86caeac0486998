"""What is said to Firecracker and what it says: requests, both forms of its errors, and how its end is understood."""

from pathlib import Path

import pytest

from hypervisor.agent.drivers.microvm.firecracker_api import parse_error
from hypervisor.agent.drivers.microvm.firecracker_config import rate_limiter, requests
from hypervisor.agent.drivers.microvm.firecracker_end import end_of
from hypervisor.agent.drivers.microvm.vmm import Card, Machine
from hypervisor.core.errors import FailedPrecondition, ResourceExhausted
from hypervisor.core.machines import MicrovmOptions, RateLimit

STAMP = "2026-11-26T16:04:09.864782758 [i-1:main] "


def machine(**changes: object) -> Machine:
    """A small one."""
    fields: dict[str, object] = {
        "instance_id": "i-1",
        "directory": Path("/d"),
        "run_dir": Path("/r"),
        "vcpus": 2,
        "memory_mib": 64,
    }
    return Machine(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"fault_message": "The kernel file cannot be opened"}', "The kernel file cannot be opened"),
        (b'{"error": "Invalid HTTP Method!"}', "Invalid HTTP Method!"),
        (b"not json at all", "not json at all"),
        (b'["a list"]', "a list"),
        (b"", "status 400"),
        (b'{"fault_message": ""}', "fault_message"),
        (b"\xff\xfe", "\ufffd"),
    ],
)
def test_every_form_of_an_error_is_told(text: bytes, words: str) -> None:
    error = parse_error(text, request="PUT /boot-source", status=400)

    assert isinstance(error, FailedPrecondition)
    assert error.reason == "VMM_REFUSED"
    assert words in error.message
    assert "PUT /boot-source" in error.message


def test_a_long_error_is_cut() -> None:
    error = parse_error(b'{"fault_message": "' + b"x" * 100_000 + b'"}', request="PUT /", status=400)

    assert len(error.message) < 1000


def test_a_full_disk_is_an_error_of_its_own() -> None:
    error = parse_error(
        b'{"fault_message": "Cannot write memory file: No space left on device (os error 28)"}',
        request="PUT /snapshot/create",
        status=400,
    )

    assert isinstance(error, ResourceExhausted)
    assert error.reason == "DISK_FULL"


def test_a_machine_with_nothing_has_no_device_but_entropy() -> None:
    paths = [path for path, _ in requests(machine(), fresh=True)]

    assert paths == ["/metrics", "/machine-config", "/boot-source", "/entropy"]


def test_everything_that_was_asked_for_is_asked_of_firecracker() -> None:
    options = MicrovmOptions(
        metadata='{"a": {"b": 1}}', vsock=True, balloon=True, network_limit=RateLimit(operations_per_second=7)
    )
    wanted = machine(
        initrd=True,
        disk=True,
        kernel_args="quiet",
        cards=(Card("hv1.0", "06:00:00:00:00:01"), Card("hv1.1", "06:00:00:00:00:02")),
        options=options,
    )

    asked = dict(requests(wanted, fresh=True))

    assert asked["/boot-source"]["initrd_path"] == "initrd"
    assert asked["/boot-source"]["boot_args"].endswith(" quiet")
    assert asked["/machine-config"] == {"vcpu_count": 2, "mem_size_mib": 64, "track_dirty_pages": True}
    assert asked["/drives/root"]["path_on_host"] == "disk.raw"
    assert "rate_limiter" not in asked["/drives/root"]
    assert asked["/network-interfaces/eth1"]["tx_rate_limiter"] == {"ops": {"size": 7, "refill_time": 1000}}
    assert asked["/mmds/config"]["network_interfaces"] == ["eth0", "eth1"]
    assert asked["/mmds"] == {"a": {"b": 1}}
    assert {"/vsock", "/balloon"} <= asked.keys()
    assert not any(str(value).startswith("/") for body in asked.values() for value in body.values())


def test_before_a_state_is_loaded_only_metrics_are_configured() -> None:
    assert [path for path, _ in requests(machine(disk=True), fresh=False)] == ["/metrics"]


def test_a_limit_of_nothing_limits_nothing() -> None:
    assert rate_limiter(RateLimit()) == {}


@pytest.mark.parametrize(
    ("log", "code", "crashed", "told", "words"),
    [
        ("Firecracker exiting successfully. exit_code=0\n", 0, False, 0, "the guest ended"),
        ("Firecracker exiting successfully. exit_code=0\n", None, False, 0, "the guest ended"),
        ("Received KVM_EXIT_SHUTDOWN signal\nx exit_code=0\n", 0, True, 1, "KVM_EXIT_SHUTDOWN"),
        ("Firecracker exiting with error. exit_code=148\n", None, True, 148, "system call"),
        ("RunWithApiError error: no\nexiting with error. exit_code=1\n", 1, True, 1, "RunWithApiError"),
        ("", 137, True, 137, "SIGKILL"),
        ("", 139, True, 139, "SIGSEGV"),
        ("", 253, True, 253, "signal 125"),
        ("Running Firecracker v1.12.1\n", None, True, None, "without a word"),
    ],
)
def test_the_end_is_told_by_code_and_log(
    tmp_path: Path, log: str, code: int | None, crashed: bool, told: int | None, words: str
) -> None:
    path = tmp_path / "vmm.log"
    path.write_text("".join(STAMP + line + "\n" for line in log.splitlines()))

    end = end_of(path, code)

    assert (end.crashed, end.exit_code) == (crashed, told)
    assert words in end.message
    assert "2026-11-26" not in end.message


def test_a_log_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{STAMP}Firecracker exiting with error. exit_code=148\n")
    (tmp_path / "vmm.log").symlink_to(secret)

    end = end_of(tmp_path / "vmm.log", None)

    assert end.exit_code is None
