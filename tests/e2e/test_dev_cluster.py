"""`dev up` from the release tarball alone: a whole cluster with one command, and nothing of it after `dev down`."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_containerd import eventually
from hvtest_programs import Result, free_port


class DevCluster:
    """A user's shell with the release on PATH and a directory for the cluster."""

    def __init__(self, release: Path) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="hv-dev-", dir="/tmp"))
        self.directory = self.home / "cluster"
        self.program = release / "bin" / "hypervisor-ctl"
        self.env = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "HOME": str(self.home),
            "HYPERVISOR_CTL_CONFIG": str(self.home / "ctl.yaml"),
            "LANG": "C.UTF-8",
        }

    def run(self, *arguments: str) -> Result:
        """Type a command."""
        return Result(
            subprocess.run(
                [str(self.program), *arguments],
                capture_output=True,
                text=True,
                env=self.env,
                stdin=subprocess.DEVNULL,
                timeout=180,
                check=False,
            )
        )

    def up(self, *arguments: str) -> Result:
        """`dev up` on free ports."""
        ports = [f"--{name}-port={free_port()}" for name in ("grpc", "http", "agent")]
        return self.run("dev", "up", "--dir", str(self.directory), *ports, *arguments)

    def processes(self) -> list[str]:
        """Command lines of processes that have to do with this cluster."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if str(self.directory) in line:
                    found.append(line)
        return found

    def kill_everything(self) -> None:
        """kill -9 for all of them, shims included; the programs of containers do not name the directory."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if os.fsencode(self.directory) in (entry / "cmdline").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)

    def cgroups(self) -> list[Path]:
        """Control groups of the cluster's containers, of any hierarchy."""
        root = Path("/sys/fs/cgroup")
        return [path for path in (root / self.name, *root.glob(f"*/{self.name}")) if path.is_dir()]

    @property
    def name(self) -> str:
        """Of what the cluster has outside of its directory."""
        return f"hypervisor-dev-{hashlib.sha256(bytes(self.directory)).hexdigest()[:8]}"

    @property
    def sockets(self) -> Path:
        """Where it has its sockets and FIFOs."""
        return Path("/run") / self.name

    def mounts(self) -> list[str]:
        """Mounts below the cluster's directory."""
        return [
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if str(self.directory) in line
        ]


@pytest.fixture
def dev(release: Path) -> Iterator[DevCluster]:
    shell = DevCluster(release)
    yield shell
    purged = shell.run("dev", "down", "--dir", str(shell.directory), "--purge")
    assert purged.code == 0, purged
    assert not shell.sockets.exists()
    assert shell.processes() == []
    assert shell.mounts() == []
    assert shell.cgroups() == []
    shutil.rmtree(shell.home, ignore_errors=True)


def test_a_cluster_with_real_containers_comes_up_and_goes_without_a_trace(dev: DevCluster) -> None:
    up = dev.up("--containerd", "private", "--hostname", "here")
    assert up.code == 0, up

    again = dev.up()
    assert again.code in (0, 4), again  # it is up already, and says so
    assert "already" in (again.out + again.err)
    status = dev.run("dev", "status", "--dir", str(dev.directory))
    assert status.code == 0, status
    assert all(word in status.out for word in ("server", "agent", "containerd"))

    made = dev.run("dev", "image", "--dir", str(dev.directory), "--binary", "/bin/busybox")
    assert made.code == 0, made
    reference = made.out.split()[-1]
    created = dev.run(
        "instance", "create", "web", "--image", reference, "--", "sh", "-c", "echo dev-$((6*7)); sleep 60"
    )
    assert created.code == 0, created
    console = dev.run("instance", "console", "web", "--read-only", "--until-idle", "1s")
    assert "dev-42" in console.out

    down = dev.run("dev", "down", "--dir", str(dev.directory))
    assert down.code == 0, down
    assert dev.processes() == []
    assert dev.mounts() == []
    assert not dev.sockets.exists()
    assert dev.run("dev", "status", "--dir", str(dev.directory)).code != 0


def test_nothing_is_left_of_a_cluster_that_was_killed_with_its_shims(dev: DevCluster) -> None:
    up = dev.up("--containerd", "private", "--hostname", "here")
    assert up.code == 0, up
    made = dev.run("dev", "image", "--dir", str(dev.directory), "--binary", "/bin/busybox")
    created = dev.run("instance", "create", "web", "--image", made.out.split()[-1], "--", "sleep", "1000")
    assert created.code == 0, created
    dev.kill_everything()
    eventually(lambda: dev.processes() == [], what="all programs of the cluster are dead")
    assert dev.cgroups() != []

    down = dev.run("dev", "down", "--dir", str(dev.directory))

    assert down.code == 0, down
    assert "could not be removed" not in down.err
    assert dev.cgroups() == []
    assert dev.mounts() == []


def test_simulated_nodes_need_no_runtime(dev: DevCluster) -> None:
    up = dev.up("--simulated", "3")
    assert up.code == 0, up

    nodes = dev.run("node", "list", "-q").out.split()
    assert len(nodes) == 3
    for kind, source in (("vm", "disk.qcow2"), ("container", "some/image:1"), ("microvm", "rootfs.ext4")):
        created = dev.run(
            "instance", "create", f"a-{kind}", "--type", kind, "--image", source, "--cpu", "0.1"
        )
        assert created.code == 0, created
    listed = dev.run("instance", "list", "-q").out.split()
    assert listed == ["a-container", "a-microvm", "a-vm"]
    stopped = dev.run("instance", "stop", "a-vm")
    assert stopped.code == 0, stopped
    assert not any("containerd" in line for line in dev.processes())
