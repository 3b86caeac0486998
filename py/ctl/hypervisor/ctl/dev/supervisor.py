"""The process behind ``dev up``: starts the others, starts again what dies, stops them all when it is told to.

It runs in the background, in a session of its own, and keeps its state on record (``state``). SIGTERM ends it; the
processes are then stopped in reverse order, so that the agent can still tell the server.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hypervisor.ctl.dev.plan import ProcessSpec
from hypervisor.ctl.dev.processes import ProcessId, identify
from hypervisor.ctl.dev.state import ClusterState, ProcessState, write_state

__all__ = ["Backoff", "describe_exit", "supervise"]

_STOP_S = 15.0
_READY_S = 15.0
_LOG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Backoff:
    """Time before a dead process is started again: doubled with each death, back to the first after a good run."""

    first_s: float = 0.2
    longest_s: float = 10.0
    good_run_s: float = 10.0

    def delay_s(self, deaths: int) -> float:
        """After that many deaths in a row."""
        return min(self.first_s * 2.0 ** max(0, min(deaths, 20) - 1), self.longest_s)


def describe_exit(code: int) -> str:
    """How a process ended, in words: ``exit code 1``, ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


@dataclass
class _Supervised:
    spec: ProcessSpec
    popen: "subprocess.Popen[bytes] | None" = None
    deaths: int = 0
    restarts: int = 0
    last_exit: str = ""
    started_s: float = 0.0
    start_at: float = 0.0
    identity: ProcessId | None = None

    def state(self) -> ProcessState:
        running = self.identity if self.popen is not None else None
        return ProcessState(self.spec.name, running, self.restarts, self.last_exit, self.started_s)


@dataclass
class _Supervisor:
    processes: list[_Supervised]
    state_path: Path
    own: ProcessId
    backoff: Backoff = field(default_factory=Backoff)
    stopping: bool = False

    def run(self, wakeups: socket.socket) -> None:
        self._record()
        try:
            while not self.stopping:
                changed = self._reap()
                changed |= self._start_due()
                if changed:
                    self._record()
                self._sleep(wakeups)
        finally:
            self._stop_all()
            self.state_path.unlink(missing_ok=True)

    def _sleep(self, wakeups: socket.socket) -> None:
        due = [p.start_at - time.monotonic() for p in self.processes if p.popen is None]
        wakeups.settimeout(max(0.01, min([*due, 60.0])))
        with contextlib.suppress(TimeoutError):
            wakeups.recv(4096)

    def _reap(self) -> bool:
        changed = False
        for item in self.processes:
            code = None if item.popen is None else item.popen.poll()
            if code is None:
                continue
            good = time.time() - item.started_s >= self.backoff.good_run_s
            item.deaths = 1 if good else item.deaths + 1
            item.restarts += 1
            item.last_exit = describe_exit(code)
            item.popen = None
            delay = self.backoff.delay_s(item.deaths)
            item.start_at = time.monotonic() + delay
            _say(f"{item.spec.name} ended ({item.last_exit}); starting it again in {delay:g} s")
            changed = True
        return changed

    def _start_due(self) -> bool:
        changed = False
        for item in self.processes:
            if self.stopping:
                break
            if item.popen is None and time.monotonic() >= item.start_at:
                self._start(item)
                changed = True
        return changed

    def _start(self, item: _Supervised) -> None:
        spec = item.spec
        _make_room(spec.log)
        try:
            with spec.log.open("ab") as log:
                item.popen = subprocess.Popen(
                    spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd="/",
                )
        except OSError as exc:
            item.deaths += 1
            item.restarts += 1
            item.last_exit = f"cannot be started: {exc}"
            item.start_at = time.monotonic() + self.backoff.delay_s(item.deaths)
            _say(f"{spec.name} {item.last_exit}")
            return
        item.started_s = time.time()
        item.identity = identify(item.popen.pid)
        _say(f"started {spec.name} as process {item.popen.pid}")
        if spec.wait_for is not None:
            self._record()
            self._await_socket(item, spec.wait_for)

    def _await_socket(self, item: _Supervised, path: Path) -> None:
        """Wait until it accepts connections: what comes next needs it. Whatever happens, the others start too."""
        end = time.monotonic() + _READY_S
        while (
            not self.stopping
            and time.monotonic() < end
            and item.popen is not None
            and item.popen.poll() is None
        ):
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(path))
                return
            time.sleep(0.02)
        _say(f"{item.spec.name} does not answer on {path}")

    def _stop_all(self) -> None:
        for item in reversed(self.processes):
            popen = item.popen
            if popen is None:
                continue
            popen.terminate()
            try:
                popen.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                _say(f"{item.spec.name} did not end in {_STOP_S:g} s: killing it")
                popen.kill()
                popen.wait()
            _say(f"stopped {item.spec.name}")
            item.popen = None
            self._record()

    def _record(self) -> None:
        write_state(self.state_path, ClusterState(self.own, tuple(item.state() for item in self.processes)))


def supervise(specs: Sequence[ProcessSpec], state_path: Path) -> None:
    """Run until SIGTERM or SIGINT. Call in a process of its own, in its main thread."""
    own = identify(os.getpid())
    if own is None:
        raise RuntimeError("the supervisor cannot find itself in /proc")
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    supervisor = _Supervisor([_Supervised(spec) for spec in specs], state_path, own)

    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.stopping = True

    def child(number: int, frame: FrameType | None) -> None:
        """Its arrival wakes the loop through the wake-up descriptor."""

    with reading, writing:
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, child)
        supervisor.run(reading)


def _make_room(log: Path) -> None:
    """Keep one older log once it is large."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_name(log.name + ".1"))


def _say(text: str) -> None:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    print(f"{moment} {text}", file=sys.stderr, flush=True)
