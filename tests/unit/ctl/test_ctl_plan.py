"""What a development cluster consists of."""

from pathlib import Path

import pytest

from hypervisor.ctl.dev.plan import Plan, state_directory
from hypervisor.ctl.dev.supervisor import Backoff, describe_exit


def make_plan(**fields):
    values = {
        "root": Path("/dev-cluster"),
        "grpc_port": 1,
        "http_port": 2,
        "agent_port": 3,
        "server_program": ("server",),
        "agent_program": ("agent", "-x"),
        "hostname": "here",
    }
    return Plan(**{**values, **fields})


def test_survives_its_file():
    plan = make_plan(simulated=3, image_roots=(Path("/a"),), previous_context="lab")

    assert Plan.from_json(plan.to_json()) == plan


def test_simulated_nodes_need_no_containerd():
    plan = make_plan(simulated=3)

    assert [p.name for p in plan.processes()] == ["server", "agent"]
    assert plan.processes()[1].command[-2:] == ("--simulated", "3")
    assert "containerd" not in plan.agent_config()


def test_a_private_containerd_comes_first_and_is_waited_for():
    plan = make_plan(containerd="/dev-cluster/containerd/containerd.sock", private_containerd=True)

    first, *rest = plan.processes()

    assert first.name == "containerd"
    assert first.wait_for == Path("/dev-cluster/containerd/containerd.sock")
    assert [p.name for p in rest] == ["server", "agent"]
    assert plan.agent_config()["containerd"]["address"] == plan.containerd


def test_everything_listens_on_loopback_only():
    plan = make_plan(containerd="/x")

    assert plan.server_config()["server"] == {"grpc_address": "127.0.0.1:1", "http_address": "127.0.0.1:2"}
    assert plan.agent_config()["agent"]["bind"] == "127.0.0.1"


def test_state_directory_follows_the_environment():
    assert state_directory({"HOME": "/h"}) == Path("/h/.local/state/hypervisor/dev")
    assert state_directory({"HOME": "/h", "XDG_STATE_HOME": "/s"}) == Path("/s/hypervisor/dev")


def test_back_off_doubles_up_to_its_longest():
    backoff = Backoff(first_s=0.2, longest_s=1.0)

    assert [backoff.delay_s(n) for n in (1, 2, 3, 4, 1000)] == [0.2, 0.4, 0.8, 1.0, 1.0]


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")],
)
def test_describe_exit(code, text):
    assert describe_exit(code) == text


def test_a_private_libvirtd_is_in_directories_of_the_clusters_own():
    plan = make_plan(types=("container", "microvm", "vm"), private_libvirt=True)
    plan = make_plan(types=plan.types, private_libvirt=True, libvirt_uri=plan.libvirtd.uri)

    (libvirtd,) = [process for process in plan.processes() if process.name == "libvirtd"]
    files = plan.libvirtd.files()

    assert libvirtd.wait_for == plan.run / "libvirt" / "libvirt-sock"
    assert libvirtd.command == ("sh", str(plan.libvirtd.script))
    assert all(path.is_relative_to(plan.root) for path in files)
    assert "mount --bind /dev-cluster/libvirt/lib /var/lib/libvirt" in files[plan.libvirtd.script]
    agent = plan.agent_config()
    assert agent["drivers"] == {"enabled": ["container", "microvm", "vm"]}
    assert agent["libvirt"]["qemu_logs"] == "/dev-cluster/libvirt/log/qemu"
    assert agent["libvirt"]["uri"] == f"qemu+unix:///system?socket={libvirtd.wait_for}"
    assert Plan.from_json(plan.to_json()) == plan


def test_the_paths_of_sockets_stay_short_however_deep_the_cluster_lies():
    plan = make_plan(root=Path("/a" * 200), private_libvirt=True)

    assert len(str(plan.libvirtd.socket)) < 60
    assert len(plan.agent_config()["microvm"]["run_dir"]) < 45


def test_without_libvirt_the_agent_keeps_its_default():
    assert "libvirt" not in make_plan().agent_config()
