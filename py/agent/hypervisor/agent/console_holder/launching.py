"""How an agent comes by its console holder: the one that runs already, a new process, or one inside the agent."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import structlog

from hypervisor.agent.console_holder.server import HolderServer
from hypervisor.core.errors import FailedPrecondition

__all__ = ["LOGS", "SOCKET", "EmbeddedHolder", "HolderProcess", "Launcher", "connect", "holders_of", "listen"]

SOCKET = "console-holder.sock"
"""Name of the socket in the agent's data directory."""
LOGS = "consoles"
"""Name of the directory of consoles' logs there."""
LOG = "console-holder.log"

_BACKLOG = 8
_LOG_BYTES = 1 << 20
_PATH = "CONSOLE_HOLDER_PATH"
_BOOT = (
    f"import os, sys; sys.path[:] = os.environ.pop('{_PATH}').split(os.pathsep); "
    "from hypervisor.agent.console_holder.program import main; sys.exit(main())"
)
"""The holder imports what the agent imports, in whatever way that was started."""

_log = structlog.get_logger(__name__)


class Launcher(Protocol):
    """Where connections to a holder come from."""

    async def connect(self, *, fresh: bool) -> socket.socket:
        """A connection to the holder, which is started where none answers. ``fresh``: the one that is there is no good
        (it does not answer, or speaks another version) and is to be replaced. FailedPrecondition."""
        ...

    async def aclose(self) -> None:
        """The agent ends; a process goes on by itself."""
        ...


class HolderProcess:
    """A holder of its own process, in a session of its own, at a socket in the agent's data directory."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._path = data_dir / SOCKET
        self._child: subprocess.Popen[bytes] | None = None

    async def connect(self, *, fresh: bool) -> socket.socket:
        """See :class:`Launcher`."""
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        if fresh:
            self._end_other()
        else:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return connect(self._path)
        await asyncio.to_thread(self._start)
        return connect(self._path)

    async def aclose(self) -> None:
        """Nothing: it is to outlive the agent."""

    def _start(self) -> None:
        # Listening is begun here, so that requests wait in its queue instead of failing until the process is up.
        try:
            with listen(self._path) as listener, self._open_log() as log:
                self._child = subprocess.Popen(
                    [
                        *(sys.executable, "-I", "-S", "-c", _BOOT),
                        *("--socket", str(self._path), "--listen-fd", str(listener.fileno())),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(listener.fileno(),),
                    cwd="/",
                    env={**os.environ, _PATH: os.pathsep.join(os.path.abspath(entry) for entry in sys.path)},
                    start_new_session=True,
                )
        except OSError as exc:
            raise FailedPrecondition(
                f"the console holder cannot be started in {self._data_dir}: {exc}",
                reason="CONSOLE_HOLDER_FAILED",
                metadata={"data_dir": str(self._data_dir)},
            ) from exc
        _log.info("console_holder_started", pid=self._child.pid)

    def _open_log(self) -> IO[bytes]:
        path = self._data_dir / LOG
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > _LOG_BYTES:
                path.replace(path.with_suffix(".log.1"))
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "wb")

    def _end_other(self) -> None:
        """Kill a holder that does not answer. Found by its command line, which names our socket."""
        for pid in holders_of(self._path):
            _log.warning("console_holder_replaced", pid=pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)


class EmbeddedHolder:
    """A holder inside the agent's own process: for simulated nodes. Consoles end with the agent, their logs do not."""

    def __init__(self, data_dir: Path) -> None:
        self._logs = data_dir / LOGS
        self._server: HolderServer | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, *, fresh: bool) -> socket.socket:
        """See :class:`Launcher`."""
        if self._server is None or self._task is None or self._task.done():
            self._server = HolderServer(self._logs, idle_s=None)
            self._task = asyncio.get_running_loop().create_task(self._server.run())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.serve(theirs)
        return ours

    async def aclose(self) -> None:
        """End it."""
        if self._server is not None and self._task is not None:
            self._server.stop()
            await self._task


def listen(path: Path) -> socket.socket:
    """A socket that listens at ``path``, mode 0600, in place of what is there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with _short(temporary) as address:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            sock.bind(address)
        temporary.chmod(0o600)
        sock.listen(_BACKLOG)
        # At once in its place: nobody may find the name without a listener.
        temporary.replace(path)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: Path) -> socket.socket:
    """A connection. FileNotFoundError, ConnectionRefusedError when nobody is there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(path) as address:
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """An address of the same socket that fits: those of unix sockets have at most 107 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def holders_of(path: Path) -> list[int]:
    """Processes that hold consoles at this socket."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            at = words.index(b"--socket") if b"--socket" in words else -1
            if at >= 0 and words[at + 1 : at + 2] == [bytes(path)] and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found
