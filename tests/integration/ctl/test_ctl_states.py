"""``instance pause|resume|suspend|snapshot`` and the options of machines, against a whole server and agent."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from hvtest_agent_waiting import within
from hvtest_whole_cluster import WholeServer, whole_agent, whole_server
from hypervisor.v1 import compute_pb2, instance_pb2

Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[WholeServer]:
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path):
        yield server


@pytest.fixture
def hv(cluster: WholeServer, tmp_path: Path) -> Command:
    """Runs a command in a process of its own: exit code, standard output, standard error."""
    environ = {
        **os.environ,
        "HOME": str(tmp_path),
        "HYPERVISOR_SERVER": cluster.addresses.grpc,
        "HYPERVISOR_CTL_CONFIG": str(tmp_path / "ctl.yaml"),
    }

    async def command(*arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hypervisor.ctl", *arguments),
            env=environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await within(process.communicate(), what=f"{arguments} ends", timeout_s=30.0)
        assert process.returncode is not None
        return process.returncode, out.decode().rstrip("\n"), err.decode()

    return command


async def test_pause_resume_and_suspend_say_what_was_done(hv: Command) -> None:
    await hv("instance", "create", "web", "--image", "busybox")

    assert await hv("instance", "pause", "web") == (0, "instance web paused", "")
    assert "paused" in (await hv("instance", "list"))[1]
    assert await hv("instance", "resume", "web") == (0, "instance web resumed", "")
    assert await hv("instance", "suspend", "web") == (0, "instance web suspended", "")
    assert "SUSPENDED" in (await hv("instance", "get", "web"))[1]


async def test_resume_of_what_runs_says_what_to_do(hv: Command) -> None:
    await hv("instance", "create", "web", "--image", "busybox")

    code, _, err = await hv("instance", "resume", "web")

    assert code != 0
    assert "instance web is running" in err
    assert "NOT_PAUSED" in err


async def test_snapshots_from_create_to_delete(hv: Command) -> None:
    await hv("instance", "create", "web", "--image", "busybox")

    made = await hv("instance", "snapshot", "create", "web", "first")
    await hv("instance", "snapshot", "create", "web", "second", "--diff")
    listed = await hv("instance", "snapshot", "list", "web")
    documents = json.loads((await hv("instance", "snapshot", "list", "web", "-o", "json"))[1])
    restored = await hv("instance", "snapshot", "restore", "web", "first")
    refused = await hv("instance", "snapshot", "delete", "web", "first")
    deleted = await hv("instance", "snapshot", "delete", "web", "second")

    assert made == (0, "instance web kept as first", "")
    lines = listed[1].splitlines()
    assert lines[0].split() == ["NAME", "KIND", "MEMORY", "CURRENT", "BASED", "ON", "SIZE", "AGE"]
    assert lines[1].split()[:3] == ["first", "full", "yes"]
    assert lines[2].split()[:5] == ["second", "diff", "yes", "-", "first"]
    assert [document["name"] for document in documents] == ["first", "second"]
    assert restored[:2] == (0, "instance web is as it was in first")
    assert refused[0] != 0
    assert "SNAPSHOT_IN_USE" in refused[2]
    assert deleted[:2] == (0, "instance web has forgotten second")


async def test_options_of_machines_reach_the_server(
    hv: Command, cluster: WholeServer, tmp_path: Path
) -> None:
    (tmp_path / "user-data").write_text("#cloud-config\npackages: [curl]\n")
    (tmp_path / "key.pub").write_text("# mine\nssh-ed25519 AAAA me\n")

    code, _, err = await hv(
        *("instance", "create", "db", "--type", "vm", "--image", "/images/debian-12.qcow2", "--uefi"),
        *("--cloud-init", str(tmp_path / "user-data"), "--ssh-key", str(tmp_path / "key.pub")),
        *("--network", "br0", "--network", "br1,52:54:00:12:34:56", "--host-device", "0000:01:00.0"),
    )

    assert (code, err) == (0, "")
    spec = (await cluster.compute.GetInstance(compute_pb2.GetInstanceRequest(instance="db"))).spec
    assert spec.cloud_init.user_data == "#cloud-config\npackages: [curl]\n"
    assert list(spec.cloud_init.ssh_authorized_keys) == ["ssh-ed25519 AAAA me"]
    assert [(n.bridge, n.mac) for n in spec.networks] == [("br0", ""), ("br1", "52:54:00:12:34:56")]
    assert spec.vm.firmware == instance_pb2.FIRMWARE_UEFI
    assert list(spec.vm.host_devices) == ["0000:01:00.0"]


async def test_a_file_that_is_not_there_is_named(hv: Command) -> None:
    code, _, err = await hv(
        "instance",
        "create",
        "db",
        "--type",
        "vm",
        "--image",
        "/images/debian-12.qcow2",
        "--cloud-init",
        "/nowhere",
    )

    assert code == 2
    assert "/nowhere cannot be read" in err


async def test_a_manifest_of_machines_reaches_the_server(
    hv: Command, cluster: WholeServer, tmp_path: Path
) -> None:
    (tmp_path / "machines.yaml").write_text(
        """
name: db
type: vm
spec:
  image: /images/debian-12.qcow2
  cloud_init: {hostname: db, ssh_authorized_keys: [ssh-ed25519 AAAA me]}
  networks: [br0, {bridge: br1, mac: "52:54:00:12:34:56"}]
  vm: {firmware: uefi, host_devices: ["0000:01:00.0"], max_cpus: 4, max_memory_mb: 4096}
---
name: fn
type: microvm
spec:
  kernel_path: /boot/vmlinuz
  microvm: {vmm: qemu, vsock: true, metadata: '{"a": 1}', disk_limit: {bytes_per_second: 1000}}
"""
    )

    code, _, err = await hv("instance", "create", "-f", str(tmp_path / "machines.yaml"))

    assert (code, err) == (0, "")
    db = (await cluster.compute.GetInstance(compute_pb2.GetInstanceRequest(instance="db"))).spec
    fn = (await cluster.compute.GetInstance(compute_pb2.GetInstanceRequest(instance="fn"))).spec
    assert (db.cloud_init.hostname, db.networks[1].mac, db.vm.max_cpus, db.vm.max_memory_mb) == (
        "db",
        "52:54:00:12:34:56",
        4,
        4096,
    )
    assert (fn.microvm.vmm, fn.microvm.vsock, fn.microvm.metadata) == (
        instance_pb2.VMM_QEMU,
        True,
        '{"a": 1}',
    )
    assert fn.microvm.disk_limit.bytes_per_second == 1000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vm: {firmwar: uefi}", "spec.vm.firmwar: is not a known key: did you mean firmware?"),
        ("vm: {firmware: coreboot}", "spec.vm.firmware: 'coreboot' is not one of bios, uefi"),
        ("microvm: {vsock: maybe}", "spec.microvm.vsock: must be true or false"),
        ("networks: [{mac: x, nic: y}]", "spec.networks[0].nic: is not a known key"),
        ("microvm: [1]", "spec.microvm: must be a mapping with the keys vmm, metadata"),
    ],
)
async def test_a_mistake_in_a_manifest_is_told_with_its_line(
    hv: Command, tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(f"name: x\ntype: vm\nspec:\n  image: d\n  {text}\n")

    code, _, err = await hv("instance", "create", "-f", str(tmp_path / "wrong.yaml"))

    assert code == 2
    assert "wrong.yaml:5" in err
    assert told in err
