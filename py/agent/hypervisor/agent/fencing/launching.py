"""How the agent comes by its guard."""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import structlog

from hypervisor.agent.fencing.guard import LOCK

__all__ = ["GuardProcess"]

_LOG = "fencing-guard.log"
_PATH = "FENCING_GUARD_PATH"
_BOOT = (
    f"import os, sys; sys.path[:] = os.environ.pop('{_PATH}').split(os.pathsep); "
    "from hypervisor.agent.fencing.guard import main; sys.exit(main())"
)
"""The guard imports what the agent imports, in whatever way that was started."""
_START_S = 5.0

_log = structlog.get_logger(__name__)


class GuardProcess:
    """A guard in a process and session of its own. Each agent begins with a guard of its own version."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._lock = data_dir / LOCK
        self._child: subprocess.Popen[bytes] | None = None
        self._trouble = ""

    @property
    def trouble(self) -> str:
        """See :class:`.fence.Guard`."""
        return self._trouble

    @property
    def pid(self) -> int | None:
        """Of the guard that this agent has started."""
        return None if self._child is None else self._child.pid

    async def end(self) -> None:
        """End the guard, for tests: it outlives its agent otherwise."""
        await asyncio.to_thread(self._end_other)

    async def ensure(self) -> None:
        """See :class:`.fence.Guard`."""
        if self._child is not None and self._child.poll() is None and not self._trouble:
            return
        try:
            await asyncio.to_thread(self._start)
        except OSError as exc:
            self._trouble = f"the fencing guard cannot be started: {exc}"
            _log.error("fencing_guard_failed", error=str(exc))
        else:
            self._trouble = ""

    def _start(self) -> None:
        self._end_other()
        with (self._data_dir / _LOG).open("ab") as log:
            child = self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, "--data-dir", str(self._data_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, _PATH: os.pathsep.join(os.path.abspath(entry) for entry in sys.path)},
                start_new_session=True,
            )
        give_up = time.monotonic() + _START_S
        while not self._locked() and child.poll() is None and time.monotonic() < give_up:
            time.sleep(0.02)
        if child.poll() is not None or not self._locked():
            raise OSError(f"it ended at once, or does not lock {self._lock}; see {_LOG} beside it")
        _log.info("fencing_guard_started", pid=child.pid)

    def _locked(self) -> bool:
        """Whether a guard runs."""
        try:
            with self._lock.open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _end_other(self) -> None:
        """End the guard of an agent before this one. It is killed: it has nothing to finish."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        elif self._locked():
            with contextlib.suppress(ValueError, OSError):
                os.kill(int(self._lock.read_text("ascii")), signal.SIGKILL)
                give_up = time.monotonic() + _START_S
                while self._locked() and time.monotonic() < give_up:
                    time.sleep(0.02)
