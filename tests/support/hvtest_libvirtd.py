"""A private libvirtd for tests: its own directories, sockets and process namespace; nothing of it outlives the test.

libvirtd and the QEMU processes it starts live in mount, host name and process namespaces below one parent. That parent
is killed by the kernel when the test's process dies, however it dies, and everything in the namespace with it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from hvtest_containerd import eventually

__all__ = ["PrivateLibvirtd", "missing_for_libvirt", "qemu_processes"]

_PROGRAMS = ("libvirtd", "qemu-system-x86_64", "qemu-img", "unshare", "nsenter", "mount")
_MOUNTED = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
_START_S = 40.0
_PR_SET_PDEATHSIG = 1
_STALE_S = 900.0

# Process 1 of the namespace: without somebody who waits for orphans, libvirt would see every ended QEMU as alive.
_INIT = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
print("ready", flush=True)
while True:
    signal.sigwaitinfo({signal.SIGCHLD})
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass
"""


def missing_for_libvirt() -> list[str]:
    """What has to be installed before a test of this module can run, root rights included."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if os.geteuid() != 0:
        missing.append("root rights")
    return missing


def qemu_processes(word: str) -> list[int]:
    """Process ids of every QEMU whose command line has ``word`` in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if b"qemu-system" in line.partition(b"\0")[0] and word.encode() in line:
                    found.append(int(entry.name))
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class PrivateLibvirtd:
    """Starts, kills, restarts and ends one libvirtd below ``directory`` (short: sockets are below it).

    QEMU runs as root, or with ``own_user`` as the distribution has it: as a user who is given each file it needs.
    """

    def __init__(self, directory: Path, *, own_user: bool = False) -> None:
        self.directory = directory
        self._own_user = own_user
        self.uri = f"qemu+unix:///system?socket={directory}/sock/libvirt-sock"
        self._log = directory / "log" / "libvirtd.log"
        self._space: subprocess.Popen[str] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PrivateLibvirtd":
        _sweep_control_groups()
        for name in (*_MOUNTED, "sock"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        try:
            self._enter_namespaces()
            self.start()
        except BaseException:
            self.end_everything()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end_everything()

    def _write_configuration(self) -> None:
        etc = self.directory / "etc"
        (etc / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{self.directory}/sock"\n'
            'unix_sock_rw_perms = "0700"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
            f'host_uuid = "{uuid.uuid5(uuid.NAMESPACE_DNS, self.directory.name)}"\n'
            f'log_outputs = "3:file:{self._log}"\n',
            encoding="utf-8",
        )
        # Without virtlogd: QEMU's own words go to a file, the guests' consoles are FIFOs.
        settings = (
            'remember_owner = 0\nstdio_handler = "file"\nnamespaces = []\nsecurity_default_confined = 0\n'
        )
        if self._own_user:
            self.directory.chmod(0o711)
        else:
            settings += 'user = "root"\ngroup = "root"\ndynamic_ownership = 0\nsecurity_driver = "none"\n'
        (etc / "qemu.conf").write_text(settings, encoding="utf-8")

    def _enter_namespaces(self) -> None:
        mounts = " && ".join(
            f"mkdir -p {target} && mount --bind {self.directory}/{name} {target}"
            for name, target in _MOUNTED.items()
        )
        # Two libvirtds must not have the same host name; a directory's may have characters that no host name has.
        host = f"hv-{uuid.uuid4().hex[:12]}"
        script = f'hostname {host} && {mounts} && exec "$@"'
        self._space = subprocess.Popen(
            [
                *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *(
                    "--propagation",
                    "private",
                    "sh",
                    "-c",
                    script,
                    "sh",
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    _INIT,
                ),
            ],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self._space.stdout is not None
        assert self._space.stdout.readline() == "ready\n", "the namespaces of libvirtd could not be made"

    @property
    def _init_pid(self) -> int:
        assert self._space is not None
        return _children(self._space.pid)[0]

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.directory / "log" / "stderr.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                [
                    *("nsenter", "--target", str(self._init_pid), "--mount", "--uts", "--pid", "libvirtd"),
                    *("--pid-file", f"{self.directory}/run/libvirtd.pid"),
                ],
                stdout=log,
                stderr=log,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            )
        eventually(self._answers, what=f"libvirtd answers; see {self._log}", timeout_s=_START_S)

    def _answers(self) -> bool:
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            words = (self.directory / "log" / "stderr.log").read_text(errors="replace")
            raise AssertionError(f"libvirtd ended:\n{words[-4000:]}")
        return self.virsh("version", check=False).returncode == 0

    @property
    def pid(self) -> int:
        """Process id of libvirtd, as seen from the outside."""
        assert self._daemon is not None, "libvirtd was not started"
        return _children(self._daemon.pid)[0]

    def kill(self) -> None:
        """kill -9; guests run on."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._daemon is not None
        self._daemon.wait()
        self._daemon = None

    def freeze(self) -> None:
        """Let it hang: SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on. nsenter stops together with what it waits for."""
        assert self._daemon is not None
        for pid in (self.pid, self._daemon.pid):
            os.kill(pid, signal.SIGCONT)

    def virsh(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run virsh against it."""
        return subprocess.run(
            ["virsh", "-q", "-c", self.uri, *arguments],
            check=check,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def qemu(self, instance_id: str) -> int:
        """Process id of an instance's QEMU."""
        (pid,) = qemu_processes(f"guest={instance_id},")
        return pid

    def leftovers(self) -> dict[str, list[str]]:
        """What instances left in it, by kind."""
        found = {
            "domains": self.virsh("list", "--all", "--name").stdout.split(),
            "processes": [str(pid) for pid in qemu_processes(str(self.directory))],
            "saved memory": _names(self.directory / "lib" / "qemu" / "save"),
            "snapshots": _names(self.directory / "lib" / "qemu" / "snapshot"),
            "nvram": _names(self.directory / "lib" / "qemu" / "nvram"),
            "disks": _names(self.directory / "data" / "instances", empty=True),
            "QEMU's logs": _names(self.directory / "log" / "qemu"),
            "consoles": _names(self.directory / "data" / "consoles", empty=True),
        }
        return {kind: names for kind, names in found.items() if names}

    def control_groups(self, instance_id: str) -> list[Path]:
        """What is there of an instance's, of any run, in any hierarchy of version 1 or 2."""
        root, name = Path("/sys/fs/cgroup"), f"machine/qemu-*-{instance_id}.libvirt-qemu"
        return sorted([*root.glob(name), *root.glob(f"*/{name}")])

    def sweep_control_groups(self) -> None:
        """Remove those of every guest that ran here: libvirt leaves the ones whose QEMU ended while it was away."""
        domains = {path.stem for path in self.directory.glob("log/qemu/*.log")}
        # A process is gone for /proc a moment before it is gone for its group.
        eventually(lambda: not _sweep_control_groups(domains), what="the guests' control groups are gone")

    def end_everything(self) -> None:
        """End guests and libvirtd, and remove the directory."""
        if self._daemon is not None and self._daemon.poll() is None:
            for name in self.virsh("list", "--name", check=False).stdout.split():
                self.virsh("destroy", name, check=False)
        if self._space is not None:
            self._space.kill()
            self._space.wait()
            if self._space.stdout is not None:
                self._space.stdout.close()
        if self._daemon is not None:
            # Libvirtd went with its namespace, and with it the nsenter that waits for it.
            self._daemon.wait()
        eventually(lambda: not qemu_processes(str(self.directory)), what="all QEMU processes ended")
        self.sweep_control_groups()
        shutil.rmtree(self.directory, ignore_errors=True)


def _children(pid: int) -> list[int]:
    return [
        int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    ]


def _names(directory: Path, *, empty: bool = False) -> list[str]:
    """What is in a directory; directories with nothing in them only where ``empty`` ones count."""
    if not directory.is_dir():
        return []
    return sorted(
        entry.name for entry in directory.iterdir() if empty or not entry.is_dir() or any(entry.iterdir())
    )


def _sweep_control_groups(domains: Iterable[str] = ()) -> list[Path]:
    """Remove what killed libvirtds left: empty groups of these domains, and of any that are older than 15 minutes.

    Returns those of the domains that could not be removed.
    """
    root = Path("/sys/fs/cgroup")
    left = []
    for parent in (root, *root.iterdir()):
        for group in (parent / "machine").glob("qemu-*.libvirt-qemu"):
            named = any(group.name.endswith(f"-{domain}.libvirt-qemu") for domain in domains)
            try:
                if named or time.time() - group.stat().st_mtime > _STALE_S:
                    for inner, _, _ in os.walk(group, topdown=False):
                        os.rmdir(inner)
            except FileNotFoundError:
                continue
            except OSError:
                left += [group] if named else []
    return left
