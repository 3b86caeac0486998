"""A real etcd for tests: one process on free loopback ports, with its data in a temporary directory."""

import asyncio
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import Unavailable
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.etcd import EtcdStorage

__all__ = ["EtcdServer", "free_port", "open_etcd", "require_etcd"]

_START_TIMEOUT_S = 20.0


def require_etcd() -> str:
    """The path of the etcd binary; skips the test, with the reason printed, where there is none."""
    path = shutil.which("etcd")
    if path is None:
        pytest.skip("etcd is not installed (Debian: apt-get install etcd-server)")
    return path


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def open_etcd(*endpoints: str, request_timeout_s: float = 2.0) -> EtcdStorage:
    """A store with short time-outs, so that faults show soon; a busy machine may take several tries to open it."""
    config = StoreConfig(
        backend="etcd", endpoints=endpoints, dial_timeout_s=2.0, request_timeout_s=request_timeout_s
    )
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            with suppress(Unavailable):
                return await EtcdStorage.open(config, clock=SystemClock())


class EtcdServer:
    """Start with ``with``; ``kill`` and ``start`` it again in between as the test likes.

    ``arguments`` come after its own, and win. ``tls_port`` is for a second, encrypted address, set by who adds one.

    Its timers are short, so that it elects itself in a fraction of a second and grants leases of one second.
    """

    def __init__(self, directory: Path, *, arguments: Sequence[str] = ()) -> None:
        self._binary = require_etcd()
        self._directory = directory
        self.arguments = tuple(arguments)
        self._peer_port = free_port()
        self.port = free_port()
        self.tls_port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """``host:port`` for clients."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it serves."""
        client = f"http://{self.endpoint}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binary,
                    *("--name", "one", "--data-dir", str(self._directory / "data")),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"one={peer}"),
                    *("--heartbeat-interval", "20", "--election-timeout", "200"),
                    *self.arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self._directory / "etcd.log").read_text(errors="replace")[-2000:]
                self.kill()
                raise AssertionError(f"etcd did not start:\n{tail}")
            time.sleep(0.02)

    def kill(self) -> None:
        """``kill -9``; nothing happens when it does not run."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order."""
        self._signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=20)
            self._process = None

    def _serves(self) -> bool:
        # Its health page answers only once there is a leader.
        request = b"GET /health HTTP/1.0\r\n\r\n"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.settimeout(2.0)
                connection.sendall(request)
                return b'"true"' in b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return False
