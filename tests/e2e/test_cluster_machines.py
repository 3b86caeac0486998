"""Virtual machines and microVMs through the whole platform, as users see it: each type's whole life, and its deaths."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvtest_containerd import eventually
from hvtest_guests import KERNEL_ARGS, linux_guest
from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_microvms import FIRECRACKER, GUEST, JAILER, missing
from hvtest_programs import ProgramCluster

pytestmark = pytest.mark.timeout(300)

BOOT_S = 90.0


@dataclass(frozen=True)
class Kind:
    """A type of machine, and how its guest is talked to."""

    name: str
    options: tuple[str, ...]
    ready: str
    typed: str
    answered: str
    graceful: bool
    """Whether its guest ends itself when it is asked to."""


class Machines:
    """A cluster whose node runs all types, and what may be left of machines on it."""

    def __init__(
        self, cluster: ProgramCluster, libvirtd: PrivateLibvirtd, run_dir: Path, small_guest: Path
    ) -> None:
        self.cluster = cluster
        self.libvirtd = libvirtd
        self.run_dir = run_dir
        self.small_guest = small_guest
        self._foreign = _taps() | _groups()

    def vmm(self, instance_id: str) -> int:
        """Process id of the instance's VMM."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes()
                    if instance_id.encode() in words and words.split(b"\0")[0].endswith(_VMM_NAMES):
                        found.append(int(entry.name))
                except OSError:
                    continue
        assert len(found) == 1, found
        return found[0]

    def nothing_left(self) -> None:
        """Instances have left nothing on the node, or a moment later."""
        try:
            eventually(lambda: self.leftovers() == {}, what="nothing is left")
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {self.leftovers()}") from None

    def leftovers(self) -> dict[str, list[str]]:
        """What instances have left on the node, by kind."""
        data = self.cluster.directory / "microvms" / "instances"
        found = {
            "microvms": sorted(os.listdir(data)) if data.exists() else [],
            "sockets": sorted(path.name for path in self.run_dir.iterdir()),
            "cgroups": sorted(_groups() - self._foreign),
            "taps": sorted(_taps() - self._foreign),
        }
        found |= {f"libvirt {kind}": names for kind, names in self.libvirtd.leftovers().items()}
        return {kind: names for kind, names in found.items() if names}


def _groups() -> set[str]:
    return {str(path) for path in Path("/sys/fs/cgroup").glob("**/hypervisor-microvms/i-*")}


def _taps() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith("hv")}


_VMM_NAMES = (b"firecracker", b"qemu-system-x86_64")


@pytest.fixture(scope="module")
def machines(release: Path) -> Iterator[Machines]:
    lacking = missing_for_libvirt()
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}: tools/setup installs what is missing, as root")
    guest = linux_guest()
    run_dir = Path(tempfile.mkdtemp(prefix="hvm", dir="/tmp"))
    # A copy: below Bazel it is a link out of the directory, which the agent rightly refuses.
    small = Path(tempfile.mkdtemp(prefix="hvg", dir="/tmp"))
    if GUEST.exists():
        shutil.copyfile(GUEST, small / "guest.elf")
    with PrivateLibvirtd(Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))) as libvirtd:
        keys = {
            "drivers.enabled": "container,microvm,vm",
            "machines.roots": f"{guest.kernel.parent},{small}",
            "microvm.run_dir": str(run_dir),
            "microvm.firecracker": str(FIRECRACKER),
            "microvm.jailer": str(JAILER),
            "libvirt.uri": libvirtd.uri,
            "libvirt.data_dir": str(libvirtd.directory / "data"),
            "libvirt.qemu_logs": str(libvirtd.directory / "log" / "qemu"),
        }
        with ProgramCluster(release, agent_keys=keys) as cluster:
            yield Machines(cluster, libvirtd, run_dir, small / "guest.elf")
    for directory in (run_dir, small):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def _leave_nothing_to_the_next_test(machines: Machines) -> Iterator[None]:
    """A test that failed half-way shall not fail those after it."""
    yield
    left = machines.cluster.ctl("instance", "list", "-q").out.split()
    if left:
        machines.cluster.ctl("instance", "delete", *left, "--force")


def linux(name: str, *options: str) -> Kind:
    """A Linux guest."""
    guest = linux_guest()
    boot = ("--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--kernel-args", KERNEL_ARGS)
    return Kind(name, (*options, *boot), "READY", "echo $((40+2))-life\n", "42-life", graceful=True)


def kind_of(machines: Machines, name: str) -> Kind:
    if name == "vm":
        return linux(name, "--type", "vm", "--memory", "160MiB", "--disk", "1GiB")
    if name == "microvm-qemu":
        return linux(name, "--type", "microvm", "--vmm", "qemu", "--memory", "128MiB")
    why = missing()
    if why:
        pytest.skip(why)
    options = ("--type", "microvm", "--vmm", "firecracker", "--memory", "32MiB")
    options = (*options, "--kernel", str(machines.small_guest))
    return Kind(name, options, "HELLO", "echo life\n", "life", graceful=True)


KINDS = ("vm", "microvm-qemu", "microvm-firecracker")


def create(machines: Machines, kind: Kind, name: str) -> dict[str, Any]:
    machines.cluster.must("instance", "create", name, *kind.options, "--cpu", "0.5")
    shows(machines, name, kind.ready)
    return machines.cluster.instance(name)


def shows(machines: Machines, name: str, text: str) -> None:
    """Return once the instance has printed the text."""

    def printed() -> bool:
        return text in machines.cluster.ctl("instance", "logs", name).out

    eventually(printed, what=f"{name} prints {text}", timeout_s=BOOT_S)


def answers(machines: Machines, kind: Kind, name: str) -> None:
    """The guest answers what is typed on its console."""

    def answered() -> bool:
        typed = machines.cluster.ctl(
            *("instance", "console", name, "--replay", "none", "--until-idle", "1"), stdin=kind.typed
        )
        return kind.answered in typed.out.replace(kind.typed.strip(), "", 1)

    eventually(answered, what=f"{name} answers", timeout_s=30)


def status_of(machines: Machines, name: str) -> str:
    return str(machines.cluster.instance(name)["status"]).removeprefix("INSTANCE_STATUS_")


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_life(machines: Machines, name: str) -> None:
    cluster, kind = machines.cluster, kind_of(machines, name)

    born = create(machines, kind, "life")
    assert born["status"] == "INSTANCE_STATUS_RUNNING"
    assert born["runtime"].startswith({"vm": "libvirt", "microvm-qemu": "qemu"}.get(name, "firecracker"))
    answers(machines, kind, "life")
    sample = cluster.must("instance", "stats", "life", "-o", "json").json()
    assert int(sample["cpu_usage_ns"]) > 0
    assert int(sample["memory_used_bytes"]) > 1 << 18

    cluster.must("instance", "pause", "life")
    assert status_of(machines, "life") == "PAUSED"
    cluster.must("instance", "resume", "life")
    answers(machines, kind, "life")

    cluster.must("instance", "snapshot", "create", "life", "kept")
    (kept,) = cluster.must("instance", "snapshot", "list", "life", "-o", "json").json()
    assert (kept["name"], kept["memory"]) == ("kept", True)

    cluster.must("instance", "stop", "life", "--grace-period", "30s")
    stopped = cluster.instance("life")
    assert (stopped["status"], stopped["status_reason"]) == ("INSTANCE_STATUS_STOPPED", "EXITED")
    cluster.must("instance", "start", "life")
    cluster.must("instance", "snapshot", "restore", "life", "kept")
    assert status_of(machines, "life") == "RUNNING"
    answers(machines, kind, "life")

    cluster.must("instance", "suspend", "life")
    assert cluster.instance("life")["status_reason"] == "SUSPENDED"
    cluster.must("instance", "start", "life")
    answers(machines, kind, "life")

    cluster.must("instance", "delete", "life", "--force")
    machines.nothing_left()
    cluster.assert_nothing_left()


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_vmm_is_told_within_five_seconds_and_starts_again(machines: Machines, name: str) -> None:
    cluster, kind = machines.cluster, kind_of(machines, name)
    born = create(machines, kind, "doomed")

    os.kill(machines.vmm(born["id"]), signal.SIGKILL)
    killed = time.monotonic()
    failed = cluster.wait_status("doomed", "FAILED", timeout_s=15.0)

    assert time.monotonic() - killed < 10.0  # the five seconds, and the command line on a busy machine
    assert failed["status_reason"]
    assert failed["status_message"]
    cluster.must("instance", "start", "doomed")
    assert status_of(machines, "doomed") == "RUNNING"
    cluster.must("instance", "delete", "doomed", "--force")
    machines.nothing_left()


def test_all_types_outlive_the_agent_side_by_side(machines: Machines) -> None:
    cluster = machines.cluster
    kinds = {name: kind_of(machines, name) for name in KINDS}
    before = {name: create(machines, kind, name) for name, kind in kinds.items()}
    vmms = {name: machines.vmm(born["id"]) for name, born in before.items()}

    cluster.agent.kill()
    cluster.agent.start()
    cluster.wait_ready()

    def seen_again() -> bool:
        return all(status_of(machines, name) == "RUNNING" for name in KINDS)

    eventually(seen_again, what="all are RUNNING again", timeout_s=30)
    for name, kind in kinds.items():
        assert machines.vmm(before[name]["id"]) == vmms[name]
        assert cluster.instance(name)["started_at"] == before[name]["started_at"]
        answers(machines, kind, name)
    listed = {line.split()[0]: line.split()[1] for line in cluster.must("instance", "list").out.splitlines()}
    assert [listed[name] for name in KINDS] == ["vm", "microvm", "microvm"]
    cluster.must("instance", "delete", *KINDS, "--force")
    machines.nothing_left()


def test_two_viewers_share_the_console_of_a_virtual_machine(machines: Machines) -> None:
    cluster, kind = machines.cluster, kind_of(machines, "vm")
    create(machines, kind, "shared")
    watching = subprocess.Popen(
        [
            *(str(cluster.bin / "hypervisor-ctl"), "instance", "console", "shared", "--read-only"),
            *("--replay", "none", "--until-idle", "5"),
        ],
        env=cluster.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    answers(machines, kind, "shared")
    out, _ = watching.communicate(timeout=60)

    assert kind.answered in out
    cluster.must("instance", "delete", "shared", "--force")


HOSTILE = "a'\"<&>]]>\\$(id)`,;=%n"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--kernel", "/etc/shadow"), "spec.kernel_path"),
        (("--kernel", "/boot/../etc/shadow"), "spec.kernel_path"),
        (("--kernel", f"/{HOSTILE}"), "spec.kernel_path"),
        (("--image", "/etc/shadow"), "spec.image"),
        (("--image", f"/{HOSTILE}"), "spec.image"),
        (("--network", "br0'/><x"), "spec.networks[0].bridge"),
        (("--network", "nobridge"), "spec.networks[0].bridge"),
    ],
)
@pytest.mark.parametrize("kind", ["vm", "microvm"])
def test_a_hostile_specification_is_refused_by_field_and_leaves_nothing(
    machines: Machines, kind: str, options: tuple[str, ...], field: str
) -> None:
    guest = linux_guest()
    boot = () if "--kernel" in options else ("--kernel", str(guest.kernel))

    refused = machines.cluster.ctl("instance", "create", "evil", "--type", kind, *boot, *options)

    assert refused.code != 0
    assert field in refused.err, refused
    assert machines.cluster.must("instance", "list", "-o", "json").json() == []
    assert machines.leftovers() == {}
