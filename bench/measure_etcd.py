"""An etcd of one member for benchmarks, and how much processor time it has used."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RunningEtcd", "running_etcd"]


@dataclass(frozen=True, slots=True)
class RunningEtcd:
    """Its address (``host:port``) and process."""

    endpoint: str
    pid: int

    def cpu_s(self) -> float:
        """Processor seconds used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running_etcd(binary: str, directory: Path) -> Iterator[RunningEtcd]:
    """One member with default timers, its data in ``directory``; killed on leaving."""
    ports = []
    for _ in range(2):
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    client, peer = (f"http://127.0.0.1:{port}" for port in ports)
    process = subprocess.Popen(
        [
            binary,
            *("--name", "one", "--data-dir", str(directory / "etcd")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"one={peer}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield RunningEtcd(f"127.0.0.1:{ports[0]}", process.pid)
    finally:
        process.kill()
        process.wait()
