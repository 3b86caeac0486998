"""The guard: a small process that fences in the agent's place when that is dead, stopped or hangs.

``hypervisor-agent fencing-guard``. The agent starts it with the first instance that has to be stopped; it outlives
the agent and ends when nothing is left to guard. It reads two things in the agent's data directory: until when servers
count on the node (contact.py), and which instances have to be stopped then (marks.py). It talks to nobody, so nothing
can hold it up, and imports next to nothing, so that it is small.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hypervisor.agent.fencing.contact import CONTACT, Contact, boot_id, read_contact
from hypervisor.agent.fencing.killing import MARGIN_S, kill_instances, processes_of
from hypervisor.agent.fencing.marks import marked

__all__ = ["AFTER_S", "LOCK", "is_due", "main"]

LOCK = "fencing-guard.lock"
"""Locked, in the agent's data directory, while the guard runs; holds its pid."""
AFTER_S = 1.0
"""So long after the lease's end it leaves the work to the agent."""
_LOOK_S = 0.25
_DONE_S = 1.0
"""Between looks for what somebody starts although all was killed."""
_IDLE_S = 10.0
"""How long it stays with nothing to guard."""


def is_due(contact: Contact | None, *, boot: str, now_s: float, after_s: float = AFTER_S) -> bool:
    """Whether what is marked has to be killed now. ``now_s``: seconds since the boot, suspension included."""
    if contact is None or contact.disarmed:
        return False
    return contact.boot != boot or now_s >= contact.until_s + after_s


def main(arguments: Sequence[str] | None = None) -> int:
    """Guard until there is nothing left to; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hypervisor-agent fencing-guard", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="the agent's data directory")
    directory: Path = parser.parse_args(arguments).data_dir
    # A terminal's hang-up or Ctrl-C is for the agent.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with (directory / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _stay_alive()
        _guard(directory)
    return 0


def _guard(directory: Path) -> None:
    boot = boot_id()
    contact: Contact | None = None
    idle_since = _now_s()
    while directory.is_dir():
        marks = marked(directory)
        if marks:
            idle_since = _now_s()
            contact = read_contact(directory / CONTACT) or contact
            due = is_due(contact, boot=boot, now_s=_now_s())
            if due and contact is not None and not _kill(marks, contact.until_s + MARGIN_S):
                time.sleep(_DONE_S)
        elif _now_s() - idle_since > _IDLE_S:
            return
        time.sleep(_LOOK_S)


def _kill(marks: frozenset[str], started_before_s: float) -> bool:
    """Whether there was anything to kill."""
    found = processes_of(marks, started_before_s=started_before_s)
    if not found:
        return False
    left = kill_instances(marks, started_before_s=started_before_s)
    names = sorted(set(found.values()))
    print(
        f"guard_fenced at={time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} instances={','.join(names[:50])} "
        f"count={len(names)} left={len(left)}",
        flush=True,
    )
    return True


def _now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _stay_alive() -> None:
    """Be the last to be killed for lack of memory, and among the first to run. Where that is not allowed: as it is."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-900", "ascii")
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)


if __name__ == "__main__":
    sys.exit(main())
