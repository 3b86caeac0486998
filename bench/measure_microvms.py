"""The bare side of benchmarks of microVMs: Firecracker as a script starts it, with the guest of a few kilobytes."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hvtest_microvms import FIRECRACKER, GUEST, JAILER

__all__ = ["MEMORY_MIB", "Bare", "scratch"]

MEMORY_MIB = 64
_JAILED_AS = 1_400_000_000
"""User and group of the first jailed VMM of a script's; each has its own."""


class Api(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))

    def put(self, path: str, **body: object) -> None:
        """Set or do something."""
        self.request("PUT", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = self.getresponse()
        answer.read()
        assert answer.status == 204, (path, answer.status)


class Bare:
    """One VMM of a script's: spawned with pipes, configured, started. ``jailed``: by the jailer, as a user of its own
    in a root of its own with a copy of the guest; no control group, no record."""

    def __init__(
        self, directory: Path, number: int, *, memory_mib: int = MEMORY_MIB, jailed: bool = False
    ) -> None:
        self._jail: Path | None = None
        guest = str(GUEST)
        if jailed:
            words, guest = self._jailed(directory, number), "guest"
        else:
            self.socket = directory / f"{number}.sock"
            log = directory / f"{number}.log"
            log.touch()
            words = [str(FIRECRACKER), "--api-sock", str(self.socket), "--log-path", str(log)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        api = self._connected()
        api.put("/machine-config", vcpu_count=1, mem_size_mib=memory_mib, track_dirty_pages=True)
        api.put("/boot-source", kernel_image_path=guest, boot_args="console=ttyS0")
        api.put("/actions", action_type="InstanceStart")
        api.close()

    def _jailed(self, directory: Path, number: int) -> list[str]:
        uid = _JAILED_AS + number
        self._jail = directory / FIRECRACKER.name / f"b{number}"
        root = self._jail / "root"
        root.mkdir(parents=True)
        shutil.copyfile(GUEST, root / "guest")
        (root / "log").touch()
        for path in (root, root / "guest", root / "log"):
            os.chown(path, uid, uid)
        self.socket = root / "api.sock"
        return [
            *(str(JAILER), "--id", f"b{number}", "--exec-file", str(FIRECRACKER)),
            *("--uid", str(uid), "--gid", str(uid), "--chroot-base-dir", str(directory)),
            *("--", "--api-sock", "api.sock", "--log-path", "log"),
        ]

    def _connected(self) -> Api:
        while True:
            api = Api(self.socket)
            try:
                api.connect()
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.process.poll() is None
                time.sleep(0.001)
            else:
                return api

    def read(self) -> bytes:
        """The next output of its guest."""
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), 4096)

    def end(self) -> None:
        """Kill it and remove what is left of it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.socket.unlink()
        if self._jail is not None:
            shutil.rmtree(self._jail)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for the script's VMMs."""
    directory = Path(tempfile.mkdtemp(prefix="hv-bare-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
