"""Which processes a development cluster may end: those that are certainly its own."""

from pathlib import Path

import pytest

from hypervisor.ctl.dev import sweep
from hypervisor.ctl.dev.plan import Plan
from hypervisor.ctl.dev.processes import ProcessId

OURS = "i-01m8cbek0000000000000000ab"
FOREIGN = "i-01m8cbek0000000000000000zz"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "microvms" / "instances" / OURS).mkdir(parents=True)
    return Plan(
        root=tmp_path,
        grpc_port=1,
        http_port=2,
        agent_port=3,
        server_program=("server",),
        agent_program=("agent",),
    )


def found(plan: Plan, monkeypatch: pytest.MonkeyPatch, *words: str) -> bool:
    """Whether a process with this command line is one of the cluster's VMMs."""
    process = ProcessId(4711, 1)
    monkeypatch.setattr(sweep, "every_process", lambda: iter([process]))
    monkeypatch.setattr(sweep, "command_line", lambda _: words)
    return sweep.machines_of(plan) == [process]


def test_a_vmm_that_names_a_directory_of_the_cluster_is_its_own(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = f"file.filename={plan.root}/vms/instances/{OURS}/disk.qcow2"
    sockets = f"socket,path={plan.run}/microvms/{OURS}/qmp.sock"

    assert found(plan, monkeypatch, "/usr/bin/qemu-system-x86_64", "-drive", disk)
    assert found(plan, monkeypatch, "/usr/bin/qemu-system-x86_64", "-chardev", sockets)


@pytest.mark.parametrize("words", [("--id", OURS), (f"--id={OURS}",)])
def test_a_jailed_one_is_told_by_the_id_of_an_instance(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    assert found(plan, monkeypatch, "/firecracker", *words, "--api-sock", "run/api.sock")


@pytest.mark.parametrize(
    "words",
    [
        ("/firecracker", "--id", FOREIGN),
        ("/usr/bin/qemu-system-x86_64", "-drive", f"file=/srv/{OURS}.qcow2"),
        ("/bin/sh", "-c", f"ls /x/{OURS}"),
        (),
    ],
)
def test_others_are_left_alone(plan: Plan, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    assert not found(plan, monkeypatch, *words)


def test_a_program_of_another_kind_is_no_vmm_whatever_it_names(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not found(plan, monkeypatch, "/usr/bin/vim", f"{plan.root}/etc/agent.yaml")
