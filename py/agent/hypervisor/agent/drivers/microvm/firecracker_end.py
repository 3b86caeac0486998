"""How a run of Firecracker ended: from its exit code, or from its log where nobody could wait for it."""

import os
import re
import signal
from pathlib import Path

from hypervisor.agent.drivers.microvm.files import open_own
from hypervisor.agent.drivers.microvm.vmm import End
from hypervisor.core.names import shorten

__all__ = ["end_of", "last_words"]

_TAIL_BYTES = 64 << 10
_EXIT = re.compile(r"Firecracker exiting (?:successfully|with error)\. exit_code=(\d+)")
_FAULT = re.compile(r"Received (KVM_EXIT_(?:INTERNAL_ERROR|SHUTDOWN|FAIL_ENTRY)) signal")
_TOLD = re.compile(r"error|signal|panicked|fail", re.IGNORECASE)
_STAMP = re.compile(r"^\S+ \[[^\]]*\] ")

_CODES = {
    1: "the guest's processor met a fault it could not go on from, or the VMM an error of its own",
    148: "it made a system call that its filter forbids",
    149: "it met a bus error: memory it had mapped is gone",
    150: "it met a segmentation fault",
    151: "a file became larger than it may",
    152: "its configuration is wrong",
    153: "its command line is wrong",
}
"""Firecracker's FcExitCode."""
_FAULT_CODE = 1


def end_of(log: Path, exit_code: int | None) -> End:
    """See ``Vmm.end_of``."""
    tail = _tail(log)
    if exit_code is None:
        told = _EXIT.findall(tail)
        if not told:
            return End(True, None, "Firecracker was killed, or ended without a word in its log")
        exit_code = int(told[-1])
    if exit_code == 0 and (fault := _FAULT.search(tail)):
        # Firecracker 1.12 now and then ends with 0 all the same: its main thread overtakes the processor's.
        return End(True, _FAULT_CODE, f"Firecracker ended: {_CODES[_FAULT_CODE]} ({fault.group(1)})")
    if exit_code == 0:
        return End(False, 0, "the guest ended")
    if exit_code > 128 and exit_code not in _CODES:
        try:
            name = signal.Signals(exit_code - 128).name
        except ValueError:
            name = f"signal {exit_code - 128}"
        return End(True, exit_code, f"Firecracker was ended by {name}")
    words = last_words(tail)
    message = f"Firecracker ended with exit code {exit_code}: {_CODES.get(exit_code, 'see its log')}"
    return End(True, exit_code, f"{message} ({words})" if words else message)


def last_words(tail: str) -> str:
    """The lines of a log's end that tell of an error, without times, in at most 500 characters."""
    told = [
        _STAMP.sub("", line) for line in tail.splitlines() if _TOLD.search(line) and "API server" not in line
    ]
    return shorten("; ".join(dict.fromkeys(told[-3:])), 500)


def _tail(log: Path) -> str:
    try:
        fd = open_own(log)
    except OSError:
        return ""
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", errors="replace")
    finally:
        os.close(fd)
