"""Processes of VMMs: making one that outlives the agent, finding it again, ending it, and seeing its end at once.

A process is held by a pidfd: signals reach it and nothing that has its number later, and its end is seen by the event
loop as it happens, be it a child or one that an earlier agent made. Only a child's exit code can be known.
"""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hypervisor.agent.drivers.microvm.vmm import Launch, Run

__all__ = ["VmmProcess", "boot_id", "end_now", "processes_in", "spawn"]

_PROC = Path("/proc")


def boot_id() -> str:
    """Which boot of the machine this is."""
    return (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()


class VmmProcess:
    """A process that runs or has just ended. Close it, or wait for its end, which closes it."""

    def __init__(self, run: Run, pidfd: int, child: "subprocess.Popen[bytes] | None") -> None:
        self.run = run
        self._pidfd = pidfd
        self._child = child
        self._ended = asyncio.Event()
        self._exit_code: int | None = None
        self._listeners: list[Callable[[], None]] = []
        asyncio.get_running_loop().add_reader(pidfd, self._end)

    @classmethod
    def adopt(cls, run: Run) -> "VmmProcess | None":
        """The process of a run that another agent began; None when it is gone."""
        if run.boot_id != boot_id():
            return None
        try:
            pidfd = os.pidfd_open(run.pid)
        except ProcessLookupError:
            return None
        # After the opening: a number that was given anew meanwhile is found out.
        if _started(run.pid) != run.started:
            os.close(pidfd)
            return None
        process = cls(run, pidfd, None)
        if _is_readable(pidfd):
            # It has ended, and nobody has waited for it yet.
            process._end()
        return process

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """Once it has ended: 128 + n for signal n; None for another agent's child."""
        return self._exit_code

    def on_end(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` once it has ended."""
        self._listeners.append(listener)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing for one that has ended."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int | None:
        """Return when it has ended, with ``exit_code``."""
        await self._ended.wait()
        return self._exit_code

    def close(self) -> None:
        """Let go of it; it runs on. Idempotent."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child is not None and self._child.returncode is None:
            # Not waited for any more: without this, Popen would speak of a process left behind.
            self._child.returncode = 0
        self._child = None

    def _end(self) -> None:
        if self._child is not None:
            code = self._child.wait()
            self._exit_code = code if code >= 0 else 128 - code
        else:
            self._exit_code = _reap(self._pidfd)
        self._ended.set()
        self.close()
        for listener in self._listeners:
            listener()


async def spawn(launch: Launch, *, root: Path, stdin: int, stdout: int, stderr: int) -> VmmProcess:
    """Start it in a session of its own. Raises OSError when the program cannot be run."""

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            launch.argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=root,
            env=dict(launch.env),
            pass_fds=launch.keep,
            start_new_session=True,
        )

    child = await asyncio.to_thread(start)
    # Nobody but us waits for it, so its number cannot have been given away yet.
    pidfd = os.pidfd_open(child.pid)
    return VmmProcess(Run(child.pid, _started(child.pid) or 0, boot_id()), pidfd, child)


def processes_in(directories: Sequence[Path], *, uids: range = range(0), word: str = "") -> Iterator[Run]:
    """Processes whose root or working directory lies in one of the directories, and those of the users ``uids`` (a
    jailed one shows no directory of the node's) with ``word`` among their arguments, if one is given: another agent on
    the node may have given the same users to its own. Reads all of /proc."""
    boot = boot_id()
    wanted = tuple(f"{os.path.realpath(directory)}/" for directory in directories)
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            found = any(f"{os.readlink(entry / link)}/".startswith(wanted) for link in ("root", "cwd"))
            if not found and entry.stat().st_uid in uids:
                found = not word or word.encode() in (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        started = _started(int(entry.name), ended_is_none=True) if found else None
        if started is not None:
            yield Run(int(entry.name), started, boot)


def end_now(pid: int, *, timeout_s: float) -> bool:
    """SIGKILL for a process that nobody holds; blocks until it has ended, and returns whether it has."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return _is_readable(pidfd, timeout_s=timeout_s)
    finally:
        os.close(pidfd)


def _is_readable(fd: int, *, timeout_s: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _reap(pidfd: int) -> int | None:
    """The exit code, should it be this process's child after all: an earlier driver in it may have made it."""
    try:
        told = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if told is None:
        return None
    return told.si_status if told.si_code == os.CLD_EXITED else 128 + told.si_status


def _started(pid: int, *, ended_is_none: bool = False) -> int | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text("utf-8", errors="replace")
    except OSError:
        return None
    # The second field, the program's name, may hold anything; the last ')' ends it.
    fields = text[text.rindex(")") + 2 :].split()
    return None if ended_is_none and fields[0] in "ZX" else int(fields[19])
