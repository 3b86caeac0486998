"""Which processes a development cluster may end: those that are certainly its own."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisor.core.errors import FailedPrecondition
from hypervisor.ctl.dev import cluster, sweep
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


def test_a_program_that_is_on_no_record_is_found_by_its_configuration(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        1: ("/bin/agent", "--config", f"{plan.root}/etc/agent.yaml"),
        2: ("/usr/sbin/libvirtd", "--pid-file", f"{plan.run}/libvirt/libvirtd.pid"),
        3: ("/usr/bin/vim", f"{plan.root}/etc/agent.yaml"),
        4: ("/bin/agent", "--config", "/elsewhere/etc/agent.yaml"),
        5: ("/bin/agent", "--config"),
        6: (),
    }
    monkeypatch.setattr(sweep, "every_process", lambda: iter([ProcessId(pid, 1) for pid in lines]))
    monkeypatch.setattr(sweep, "command_line", lambda process: lines[process.pid])

    assert [process.pid for process in sweep.programs_of(plan)] == [1, 2]


@pytest.fixture
def run(plan: Plan, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the directory below /run."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "microvms").mkdir()
    monkeypatch.setattr(Plan, "run", directory)
    monkeypatch.setattr(sweep, "every_process", lambda: iter([]))
    plan.layout.plan.write_text(plan.to_json())
    return directory


def test_the_directory_of_the_sockets_goes_with_what_is_stopped_and_the_data_stays(
    plan: Plan, run: Path
) -> None:
    assert sweep.sweep(plan) == []

    assert not run.exists()
    assert (plan.root / "microvms" / "instances" / OURS).is_dir()


def test_a_purge_removes_it_also_where_the_nodes_are_simulated_by_now(plan: Plan, run: Path) -> None:
    plan.layout.plan.write_text(replace(plan, simulated=2).to_json())

    cluster.purge(plan.root)

    assert not run.exists()
    assert not plan.root.exists()


def test_a_purge_says_what_it_cannot_delete_and_can_be_repeated(
    plan: Plan, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmdir = os.rmdir

    def busy(path: str, *, dir_fd: int | None = None) -> None:
        if os.path.basename(path) == "microvms":
            raise OSError(16, "Device or resource busy", path)
        rmdir(path, dir_fd=dir_fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        with pytest.raises(FailedPrecondition, match=r"microvms \(Device or resource busy\)") as failed:
            cluster.purge(plan.root)
    assert failed.value.reason == "NOT_PURGED"

    cluster.purge(plan.root)

    assert not run.exists()
    assert not plan.root.exists()
