"""Several servers over one etcd of several members, and simulated nodes: all as processes, none of which needs root."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from hvtest_etcd import free_port, require_etcd
from hvtest_programs import Program

__all__ = ["EtcdGroup", "ServerGroup", "eventually"]

_START_S = 60.0


def eventually(condition: Callable[[], bool], *, what: str, timeout_s: float = _START_S) -> None:
    """Wait for ``condition``; AssertionError with ``what`` when it does not come."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


class EtcdGroup:
    """``size`` members of one etcd. ``with`` starts and ends them."""

    def __init__(self, directory: Path, *, size: int = 3) -> None:
        binary = require_etcd()
        self.client_ports = [free_port() for _ in range(size)]
        peers = [f"http://127.0.0.1:{free_port()}" for _ in range(size)]
        initial = ",".join(f"m{at}={peer}" for at, peer in enumerate(peers))
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
        self.members = [
            Program(
                [
                    binary,
                    *("--name", f"m{at}", "--data-dir", str(directory / f"etcd-{at}")),
                    *("--listen-client-urls", f"http://127.0.0.1:{port}"),
                    *("--advertise-client-urls", f"http://127.0.0.1:{port}"),
                    *("--listen-peer-urls", peers[at], "--initial-advertise-peer-urls", peers[at]),
                    *("--initial-cluster", initial, "--initial-cluster-token", directory.name),
                    *("--heartbeat-interval", "100", "--election-timeout", "1000"),
                ],
                log=directory / f"etcd-{at}.log",
                env=environment,
            )
            for at, port in enumerate(self.client_ports)
        ]

    @property
    def endpoints(self) -> list[str]:
        """``host:port`` of each member for clients."""
        return [f"127.0.0.1:{port}" for port in self.client_ports]

    def leader(self) -> int:
        """Which member leads; -1 while none is known to."""
        import json
        import urllib.request

        for at, port in enumerate(self.client_ports):
            if not self.members[at].running:
                continue
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v3/maintenance/status", data=b"{}")
            try:
                with urllib.request.urlopen(request, timeout=2) as answer:
                    status = json.load(answer)
            except OSError:
                continue
            if status.get("leader", "0") == status["header"]["member_id"]:
                return at
        return -1

    def __enter__(self) -> Self:
        for member in self.members:
            member.start()
        try:
            eventually(lambda: self.leader() >= 0, what="etcd has a leader")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            if member.running:
                member.kill()


class ServerGroup:
    """Servers and agents of simulated nodes over an :class:`EtcdGroup`. ``with`` starts and ends everything.

    ``binaries`` has the programs. ``spare``: servers that agents and clients know, but that are not started at first.
    """

    def __init__(
        self,
        binaries: Path,
        *,
        servers: int = 3,
        spare: int = 0,
        agents: int = 2,
        server_keys: Mapping[str, str] | None = None,
    ) -> None:
        # Short, for the sockets below it.
        self.directory = Path(tempfile.mkdtemp(prefix="hv-", dir="/tmp"))
        self._binaries = binaries
        self._env = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(self.directory),
            "HYPERVISOR_CTL_CONFIG": str(self.directory / "ctl.yaml"),
            "LANG": "C.UTF-8",
        }
        self.etcd = EtcdGroup(self.directory)
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(servers + spare)]
        self._started = servers
        self.servers = [
            self._program(
                "server",
                f"server-{at}",
                {
                    "server.grpc_address": address,
                    "server.http_address": "127.0.0.1:0",
                    "store.backend": "etcd",
                    "etcd.endpoints": ",".join(self.etcd.endpoints),
                    "image_store.dir": str(self.directory / f"images-{at}"),
                    "heartbeat.interval": "1s",
                    "heartbeat.timeout": "15s",
                    **(server_keys or {}),
                },
            )
            for at, address in enumerate(self.addresses)
        ]
        self.agents = [self._agent(at) for at in range(agents)]

    def _agent(self, at: int) -> Program:
        # Each has another server first.
        first = at % self._started
        addresses = self.addresses[first:] + self.addresses[:first]
        keys = {
            "node.hostname": f"node{at}",
            "agent.bind": "127.0.0.1",
            "agent.server_address": ",".join(addresses),
            "agent.data_dir": str(self.directory / f"agent-{at}"),
            "metrics.address": "127.0.0.1:0",
            "simulated.first_port": str(free_port()),
        }
        return self._program("agent", f"agent-{at}", keys, "--simulated", "1")

    def _program(self, kind: str, name: str, keys: Mapping[str, str], *more: str) -> Program:
        flags = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        command = [str(self._binaries / f"hypervisor-{kind}"), *flags, *more]
        return Program(command, log=self.directory / f"{name}.log", env=self._env)

    def ctl(self, *arguments: str, timeout_s: float = 120.0) -> "subprocess.CompletedProcess[str]":
        """Run the command line; it knows all servers."""
        return subprocess.run(
            [str(self._binaries / "hypervisor-ctl"), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self._env | {"HYPERVISOR_SERVER": ",".join(self.addresses)},
            check=False,
        )

    def serving(self, at: int) -> bool:
        """Whether that server answers calls."""
        done = self.ctl("--server", self.addresses[at], "cluster", "info", timeout_s=60)
        return done.returncode == 0

    def pause(self, at: int) -> None:
        """SIGSTOP a server; it hangs until :meth:`resume`."""
        os.kill(self.servers[at].pid, signal.SIGSTOP)

    def resume(self, at: int) -> None:
        """SIGCONT."""
        os.kill(self.servers[at].pid, signal.SIGCONT)

    def logs(self) -> str:
        """The end of each log of a server, for messages."""
        return "\n".join(f"--- {s.log.name}\n{s.text()[-2000:]}" for s in self.servers)

    def __enter__(self) -> Self:
        try:
            self.etcd.__enter__()
            for server in self.servers[: self._started]:
                server.start()
            for agent in self.agents:
                agent.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in (*self.agents, *self.servers):
            if program.running:
                program.kill()
        self.etcd.__exit__(None, None, None)
        shutil.rmtree(self.directory, ignore_errors=True)
