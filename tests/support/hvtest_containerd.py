"""A private containerd for tests: its own directories and socket, no CRI, and checks that nothing is left behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["PrivateContainerd", "eventually", "missing_programs"]

T = TypeVar("T")

_PROGRAMS = ("containerd", "containerd-shim-runc-v2", "runc", "ctr")
_START_S = 20.0


def missing_programs() -> list[str]:
    """What has to be installed before a test of this module can run, root rights included."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        missing.append("root rights")
    return missing


def eventually(probe: Callable[[], T], *, what: str, timeout_s: float = 20.0) -> T:
    """The first true result of ``probe``, or AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = probe()
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class PrivateContainerd:
    """Starts, kills and ends one containerd below ``directory``; ``with`` does the first and the last.

    ``directory`` has to be short: shims have a socket below it, and a socket's path has at most 107 bytes.
    Control groups are named after the namespace, so tests that run beside others need one of their own.
    """

    def __init__(self, directory: Path, *, namespace: str = "hypervisor") -> None:
        self.directory = directory
        self.namespace = namespace
        self.address = directory / "c.sock"
        self._config = directory / "config.toml"
        self._log = directory / "containerd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PrivateContainerd":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._config.write_text(
            "version = 2\n"
            f'root = "{self.directory}/root"\n'
            f'state = "{self.directory}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self.address}"\n'
            "[plugins]\n"
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{self.directory}/opt"\n',
            encoding="utf-8",
        )
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end_everything()

    @property
    def pid(self) -> int:
        """Process id of the running containerd."""
        assert self._process is not None, "containerd was not started"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["containerd", "--config", str(self._config)], stdout=log, stderr=log, start_new_session=True
            )
        eventually(self._answers, what=f"containerd answers; see {self._log}", timeout_s=_START_S)

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"containerd ended:\n{self._log.read_text(errors='replace')[-4000:]}")
        return self.ctr("version", check=False).returncode == 0

    def kill(self) -> None:
        """kill -9; containers run on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def ctr(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run ctr against it."""
        return subprocess.run(
            ["ctr", "-a", str(self.address), "-n", self.namespace, *arguments],
            check=check,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def _listed(self, *arguments: str) -> list[str]:
        return self.ctr(*arguments).stdout.split()

    def shims(self) -> list[int]:
        """Process ids of all shims of this containerd."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"shim" in words[0] and os.fsencode(self.address) in words:
                    found.append(int(entry.name))
        return found

    def mounts(self) -> list[str]:
        """Mount points below its directory."""
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        return [line.split()[4] for line in lines if line.split()[4].startswith(f"{self.directory}/")]

    def cgroups(self) -> list[str]:
        """Control groups of containers in its namespace."""
        return [
            str(child) for parent in self._cgroup_parents() for child in parent.iterdir() if child.is_dir()
        ]

    def _cgroup_parents(self) -> list[Path]:
        root = Path("/sys/fs/cgroup")
        parents = [root / self.namespace, *(d / self.namespace for d in root.iterdir() if d.is_dir())]
        return [parent for parent in parents if parent.is_dir()]

    def leftovers(self) -> dict[str, list[str]]:
        """What containers left in it, by kind; imported images with their snapshots are no leftovers."""
        snapshots = [line.split() for line in self.ctr("snapshots", "ls").stdout.splitlines()[1:]]
        found = {
            "containers": self._listed("containers", "ls", "-q"),
            "tasks": self._listed("tasks", "ls", "-q"),
            "active snapshots": [row[0] for row in snapshots if row[-1] != "Committed"],
            "leases": self._listed("leases", "ls", "-q"),
            "ingests": self._listed("content", "active")[3:],
            "shims": [str(pid) for pid in self.shims()],
            "mounts": self.mounts(),
            "cgroups": self.cgroups(),
        }
        return {kind: names for kind, names in found.items() if names}

    def _made_here(self) -> set[str]:
        """Ids of the containers that have a task in this containerd, running or not."""
        tasks = self.directory / "state" / "io.containerd.runtime.v2.task" / self.namespace
        return {entry.name for entry in tasks.iterdir()} if tasks.is_dir() else set()

    def end_everything(self) -> None:
        """End containers, shims and containerd, and remove the directory."""
        ours = self._made_here()
        if self._process is not None and self._process.poll() is None:
            # What does not answer any more is ended all the same.
            for name in self.ctr("tasks", "ls", "-q", check=False).stdout.split():
                self.ctr("tasks", "rm", "-f", name, check=False)
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid in self.shims():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for path in sorted(self.mounts(), reverse=True):
            subprocess.run(["umount", "-l", path], check=False, capture_output=True)
        for path in self.cgroups():
            # Other tests may be using the same namespace in another containerd.
            if Path(path).name in ours:
                _remove_cgroup(Path(path))
        for parent in self._cgroup_parents():
            # Refused while somebody else's containers are in it.
            with contextlib.suppress(OSError):
                parent.rmdir()
        shutil.rmtree(self.directory, ignore_errors=True)


def _remove_cgroup(path: Path) -> None:
    """End what runs in a control group that nobody manages any more, and remove it."""
    try:
        inside = (path / "cgroup.procs").read_text().split()
    except OSError:
        # It went away by itself.
        return
    for name in inside:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(name), signal.SIGKILL)
    eventually(lambda: _try_rmdir(path), what=f"{path} is empty")


def _try_rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
