"""The built programs as processes: one server, agents and a private containerd, driven by the built command line.

Everything is below one short temporary directory and ends with the context; logs are shown when something goes wrong.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from hvtest_containerd import PrivateContainerd, eventually
from hypervisor.agent.console_holder.launching import SOCKET, holders_of
from hypervisor.v1 import cluster_pb2_grpc, compute_pb2_grpc, operation_pb2_grpc

__all__ = ["Program", "ProgramCluster", "Result", "free_port", "unpack_release"]

_START_S = 30.0


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def unpack_release(directory: Path) -> Path:
    """Unpack the tarball named by HYPERVISOR_RELEASE; returns its directory with bin/ in it."""
    # By tar: Debian 12's tarfile (3.11.2) has no extraction filters yet.
    command = ["tar", "-xzf", os.environ["HYPERVISOR_RELEASE"], "-C", str(directory)]
    subprocess.run(command, check=True, timeout=120)
    return next(path.parent.parent for path in sorted(directory.glob("**/bin/hypervisor-ctl")))


class Result:
    """What a command printed, and its exit code."""

    def __init__(self, done: "subprocess.CompletedProcess[str]") -> None:
        self.code = done.returncode
        self.out = done.stdout
        self.err = done.stderr

    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


class Program:
    """One of the built programs as a process that can be killed and started again."""

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        self._command = list(command)
        self._env = dict(env)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )

    def set(self, key: str, value: str) -> None:
        """Override a key of its configuration from its next start on."""
        self._command += ["--set", f"{key}={value}"]

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        try:
            return self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(
                f"{self._command[0]} did not end; see its log:\n{self.text()[-3000:]}"
            ) from None

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class ProgramCluster:
    """One server, one agent and a private containerd; ``with`` starts and ends them.

    ``server_keys`` and ``agent_keys`` override configuration keys (``heartbeat.interval``: ``1s``); ``context`` adds to
    the command line's (``tls``, ``token``).
    """

    def __init__(
        self,
        root: Path,
        *,
        server_keys: Mapping[str, str] | None = None,
        agent_keys: Mapping[str, str] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        self.bin = root / "bin"
        # Short: containerd's shims have sockets below it, whose paths have at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="hv-", dir="/tmp"))
        self.port = free_port()
        self.agent_port = free_port()
        self.metrics_port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.hostname = "e2e-node"
        # A name of its own in cgroups, which several clusters of this machine share.
        self.containerd = PrivateContainerd(self.directory / "c", namespace=f"e2e-{self.port}")
        self.images = self.directory / "images"
        self.env = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "HOME": str(self.directory),
            "HYPERVISOR_CTL_CONFIG": str(self.directory / "ctl.yaml"),
            "LANG": "C.UTF-8",
            "TERM": "xterm",
        }
        # JSON is YAML, too.
        settings = {
            "contexts": {"e2e": {"server": self.address} | dict(context or {})},
            "current": "e2e",
        }
        (self.directory / "ctl.yaml").write_text(json.dumps(settings))
        heartbeat = {"heartbeat.interval": "1s", "heartbeat.timeout": "5s"}
        self.server = self._program(
            "server",
            {
                "server.grpc_address": self.address,
                "server.http_address": "127.0.0.1:0",
                "store.path": str(self.directory / "store.db"),
            }
            | heartbeat
            | dict(server_keys or {}),
        )
        self.agent = self._program(
            "agent",
            {
                "node.hostname": self.hostname,
                "agent.bind": "127.0.0.1",
                "agent.port": str(self.agent_port),
                "agent.server_address": self.address,
                "agent.data_dir": str(self.directory / "agent"),
                "containerd.address": str(self.containerd.address),
                "containerd.namespace": self.containerd.namespace,
                "containerd.console_root": str(self.directory / "consoles"),
                "images.archive_roots": str(self.images),
                "microvm.data_dir": str(self.directory / "microvms"),
                "drivers.health_interval": "1s",
                "metrics.address": f"127.0.0.1:{self.metrics_port}",
            }
            | dict(agent_keys or {}),
        )

    def _program(self, name: str, keys: Mapping[str, str]) -> Program:
        flags = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        return Program(
            [str(self.bin / f"hypervisor-{name}"), *flags], log=self.directory / f"{name}.log", env=self.env
        )

    def __enter__(self) -> "ProgramCluster":
        self.images.mkdir()
        try:
            self.containerd.__enter__()
            self.server.start()
            self.agent.start()
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for program in (self.agent, self.server):
            if program.running:
                program.kill()
        self.containerd.end_everything()
        # It outlives its agent on purpose.
        for pid in self.console_holders():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def console_holders(self) -> list[int]:
        """Processes that hold the node's consoles: one, but for moments."""
        return holders_of(self.directory / "agent" / SOCKET)

    def console_log_end(self, instance_id: str) -> int:
        """Position up to which the node has an instance's output on disk."""
        files = sorted((self.directory / "agent" / "consoles" / instance_id).glob("[0-9]*.log"))
        return int(files[-1].stem) + files[-1].stat().st_size if files else 0

    def make_image(self, *, name: str = "busybox:test") -> Path:
        """An OCI archive of Debian's busybox-static, made by the command line, in a directory the agent may read."""
        path = self.images / "busybox.tar"
        self.must("dev", "image", "--binary", "/bin/busybox", "--name", name, "-o", str(path))
        return path

    def wait_ready(self) -> None:
        """Return once the node is READY with a driver for containers."""

        def ready() -> bool:
            for program in (self.server, self.agent):
                assert program.running, f"{program.log} ended:\n{program.text()[-4000:]}"
            answer = self.ctl("node", "get", self.hostname, "-o", "json")
            if answer.code:
                return False
            node = answer.json()
            drivers = [d for d in node.get("drivers", []) if "INSTANCE_TYPE_CONTAINER" in d.get("types", [])]
            return node["status"] == "NODE_STATUS_READY" and any(d.get("available") for d in drivers)

        try:
            eventually(ready, what="the node is READY", timeout_s=_START_S)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.logs()}") from None

    def logs(self) -> str:
        """The ends of both logs, for a failure's message."""
        return f"--- server\n{self.server.text()[-4000:]}\n--- agent\n{self.agent.text()[-4000:]}"

    def ctl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120.0) -> Result:
        """Run the command line."""
        return Result(
            subprocess.run(
                [str(self.bin / "hypervisor-ctl"), *arguments],
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                env=self.env,
                check=False,
            )
        )

    def must(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120.0) -> Result:
        """Run the command line and insist on success."""
        result = self.ctl(*arguments, stdin=stdin, timeout_s=timeout_s)
        assert result.code == 0, f"{' '.join(arguments)}: {result!r}\n{self.logs()}"
        return result

    def instance(self, name: str) -> dict[str, Any]:
        """One instance as JSON."""
        found: dict[str, Any] = self.must("instance", "get", name, "-o", "json").json()
        return found

    def node(self) -> dict[str, Any]:
        """The node as JSON."""
        found: dict[str, Any] = self.must("node", "get", self.hostname, "-o", "json").json()
        return found

    def wait_status(self, name: str, status: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
        """The instance once it has this status."""
        seen: dict[str, Any] = {}

        def there() -> bool:
            seen.update(self.instance(name))
            return bool(seen["status"] == f"INSTANCE_STATUS_{status}")

        try:
            eventually(there, what=f"{name} is {status}", timeout_s=timeout_s)
        except AssertionError as exc:
            raise AssertionError(f"{exc}; it is {seen}\n{self.logs()}") from None
        return seen

    def channel(self) -> grpc.Channel:
        """A channel to the server, for what the command line does not say."""
        return grpc.insecure_channel(self.address)

    def compute(self, channel: grpc.Channel) -> compute_pb2_grpc.ComputeServiceStub:
        """The compute API on a channel."""
        return compute_pb2_grpc.ComputeServiceStub(channel)

    def cluster_api(self, channel: grpc.Channel) -> cluster_pb2_grpc.ClusterServiceStub:
        """The cluster API on a channel."""
        return cluster_pb2_grpc.ClusterServiceStub(channel)

    def operations(self, channel: grpc.Channel) -> operation_pb2_grpc.OperationServiceStub:
        """The operations API on a channel."""
        return operation_pb2_grpc.OperationServiceStub(channel)

    def reserved(self) -> dict[str, Any]:
        """What is reserved on the node; zeros where the wire leaves them out."""
        held = self.node().get("reservation", {})
        return {
            "cpu_cores": float(held.get("cpu_cores", 0)),
            "memory_bytes": int(held.get("memory_bytes", 0)),
            "instances": int(held.get("instances", 0)),
        }

    def assert_nothing_left(self) -> None:
        """No instance has left anything: containerd, cgroups, mounts, shims, FIFOs, records, reservations."""
        eventually(lambda: not self.containerd.leftovers(), what="containerd is clean", timeout_s=10)
        fifos = [str(path) for path in (self.directory / "consoles").rglob("*") if path.is_fifo()]
        assert fifos == []
        assert self.must("instance", "list", "-o", "json").json() == []
        assert self.reserved() == {"cpu_cores": 0.0, "memory_bytes": 0, "instances": 0}


def wait_gone(pid: int, *, timeout_s: float = 10.0) -> None:
    """Return once the process has ended."""
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)
