"""One conversation with a QEMU process over QMP: commands, jobs, and handing it open files.

QEMU listens for one client at a time, so a conversation is short: connect, do one thing, go. A second one waits for its
greeting meanwhile. Everything is bounded by time; a QEMU that does not answer is ``Unavailable`` (``VMM_UNREACHABLE``),
one that refuses ``FailedPrecondition`` (``VMM_REFUSED``) with its words.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError

from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, ResourceExhausted, Unavailable

__all__ = ["Monitor", "disk_full", "open_monitor"]

_GREETING_S = 10.0
_ANSWER_S = 10.0
_GOODBYE_S = 1.0
_JOB_POLL_S = 0.01
_CONNECT_POLL_S = 0.005
_DISK_FULL = ("No space left on device", "Disk quota exceeded")


class Monitor:
    """An open conversation; made by :func:`open_monitor`."""

    def __init__(self, client: QMPClient, channel: socket.socket) -> None:
        self._client = client
        self._channel = channel

    @property
    def pid(self) -> int:
        """The process that listens at the other end."""
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack("3i", self._channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return int(pid)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = _ANSWER_S
    ) -> Any:
        """The command's answer. ``FailedPrecondition``, ``ResourceExhausted`` (``DISK_FULL``), ``Unavailable``."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as exc:
            raise _refused(command, str(exc)) from exc
        except TimeoutError as exc:
            raise _unreachable(f"it has not answered {command} in {timeout_s:g} s") from exc
        except (ExecInterruptedError, QMPError, OSError, EOFError) as exc:
            raise _unreachable(f"the connection ended at {command}: {exc}") from exc

    async def attempt(self, command: str, arguments: Mapping[str, object]) -> None:
        """Execute what may have nothing to do: a refusal is fine."""
        with contextlib.suppress(FailedPrecondition):
            await self.execute(command, arguments)

    async def run_job(
        self, command: str, job: str, arguments: Mapping[str, object], *, timeout_s: float
    ) -> None:
        """Start a job and wait for its end, ``timeout_s`` seconds at most; a job that fails raises as a refusal."""
        await self.execute(command, {"job-id": job, **arguments}, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                error = await self._await_job(job)
        except TimeoutError as exc:
            raise _unreachable(f"{command} has not ended in {timeout_s:g} s") from exc
        if error:
            raise _refused(command, error)

    async def finish_job(self, job: str, *, timeout_s: float) -> None:
        """Wait for a job that an earlier conversation left, if there is one, and forget it."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._await_job(job)
        except TimeoutError as exc:
            raise _unreachable(f"an earlier {job} has not ended in {timeout_s:g} s") from exc

    async def _await_job(self, job: str) -> str:
        """What went wrong with it, once it has ended; empty: nothing, or there is no such job."""
        while True:
            # While it writes memory QEMU answers nothing at all: bounded by the caller.
            jobs = await self.execute("query-jobs", timeout_s=3600.0)
            found = next((entry for entry in jobs if entry["id"] == job), None)
            if found is None:
                return ""
            if found["status"] == "concluded":
                await self.execute("job-dismiss", {"id": job})
                return str(found.get("error", ""))
            await asyncio.sleep(_JOB_POLL_S)

    async def pass_file(self, fd: int) -> tuple[str, int]:
        """Give QEMU the open file: the name by which it opens it, and the number to take it back with."""
        # QEMU takes the descriptor that came last before the command; nothing of ours is on its way now.
        self._channel.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", fd))])
        answer = await self.execute("add-fd")
        return f"/dev/fdset/{answer['fdset-id']}", int(answer["fdset-id"])


@asynccontextmanager
async def open_monitor(path: Path, *, clock: Clock, within_s: float = 0.0) -> AsyncIterator[Monitor]:
    """Talk to the QEMU that listens at ``path``, or will do so ``within_s`` seconds."""
    channel = await _connected(path, clock=clock, within_s=within_s)
    try:
        client = QMPClient("qemu")
        # All it logs as errors is raised as well, and is none where it was expected (a process that ends).
        client.logger = logging.Logger("qemu.qmp", level=logging.CRITICAL)
        # The client closes its own descriptor; this one stays for handing over files, which asyncio cannot.
        await _greet(client, channel.dup(), path)
        try:
            yield Monitor(client, channel)
        finally:
            await _part(client)
    finally:
        channel.close()


async def _connected(path: Path, *, clock: Clock, within_s: float) -> socket.socket:
    began = clock.monotonic()
    while True:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        channel.setblocking(False)
        try:
            # On a Unix socket this never waits: it is in the queue of who listens, or nobody does.
            channel.connect(os.fspath(path))
        except OSError as exc:
            channel.close()
            # A queue that is full (it holds one) is another conversation of ours, which is about to end.
            patience_s = _GREETING_S if isinstance(exc, BlockingIOError) else within_s
            if clock.monotonic() >= began + patience_s:
                raise _unreachable(f"nothing listens at {path} ({exc.strerror or exc})") from exc
            await clock.sleep(_CONNECT_POLL_S)
        else:
            return channel


async def _greet(client: QMPClient, channel: socket.socket, path: Path) -> None:
    try:
        async with asyncio.timeout(_GREETING_S):
            await client.connect(channel)
    except TimeoutError as exc:
        channel.close()
        raise _unreachable(f"it has not greeted at {path} in {_GREETING_S:g} s") from exc
    except (ConnectError, OSError, EOFError) as exc:
        channel.close()
        raise _unreachable(f"it has hung up at {path}: {exc}") from exc
    except BaseException:
        channel.close()
        raise


async def _part(client: QMPClient) -> None:
    # It tells of a connection that broke; whoever waited for an answer has been told already.
    with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
        async with asyncio.timeout(_GOODBYE_S):
            await client.disconnect()


def disk_full(command: str, error: str) -> ResourceExhausted:
    """QEMU could not do it for want of space (``DISK_FULL``)."""
    return ResourceExhausted(
        f"the node's disk is full: free some space, or move microvm.data_dir (QEMU's {command} says: {error})",
        reason="DISK_FULL",
        metadata={"vmm": "qemu", "command": command, "cause": error},
    )


def _unreachable(why: str) -> Unavailable:
    return Unavailable(
        f"QEMU cannot be controlled: {why}", reason="VMM_UNREACHABLE", metadata={"vmm": "qemu", "cause": why}
    )


def _refused(command: str, error: str) -> HypervisorError:
    if any(text in error for text in _DISK_FULL):
        return disk_full(command, error)
    return FailedPrecondition(
        f"QEMU refuses {command}: {error}",
        reason="VMM_REFUSED",
        metadata={"vmm": "qemu", "command": command, "cause": error},
    )
