"""What a failed start means to the user."""

import pytest

from hypervisor.agent.drivers.containerd.start_errors import explain_start_failure
from hypervisor.core.errors import FailedPrecondition, InvalidArgument, Unavailable


def refused(details: str) -> FailedPrecondition:
    return FailedPrecondition(details, reason="RUNTIME_REFUSED", metadata={"details": details})


@pytest.mark.parametrize(
    ("details", "field", "reason"),
    [
        (
            "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container "
            'process: exec: "nope": executable file not found in $PATH: unknown',
            "spec.command",
            "COMMAND_NOT_FOUND",
        ),
        (
            'runc create failed: unable to start container process: exec: "/x": stat /x: no such file or directory',
            "spec.command",
            "COMMAND_NOT_FOUND",
        ),
        ("runc create failed: exec /bin/x: exec format error", "spec.command", "COMMAND_NOT_FOUND"),
        (
            "runc create failed: unable to start container process: container init was OOM-killed (memory limit too "
            "low?): unknown",
            "spec.memory_mb",
            "MEMORY_TOO_SMALL",
        ),
        (
            'chdir to cwd ("/etc/passwd") set in config.json failed: not a directory: unknown',
            "spec.working_dir",
            "WORKING_DIR_UNUSABLE",
        ),
        (
            "unable to start container process: error during container init: mkdir /etc/passwd: not a directory",
            "spec.working_dir",
            "WORKING_DIR_UNUSABLE",
        ),
    ],
)
def test_what_the_spec_causes_names_its_field(details: str, field: str, reason: str) -> None:
    explained = explain_start_failure(refused(details))

    assert isinstance(explained, InvalidArgument)
    assert explained.reason == reason
    assert explained.violations[0].field == field


def test_what_the_spec_does_not_cause_stays_as_it_is() -> None:
    for error in (refused("failed to mount rootfs component"), Unavailable("containerd is down")):
        assert explain_start_failure(error) is error
