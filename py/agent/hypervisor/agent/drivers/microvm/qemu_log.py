"""Why a run of QEMU ended, told from its exit code and the last of its log. Pure.

QEMU ends with 0 for whatever it was asked to end by (guest, signal, QMP) and with 1 for its own errors and, as it is
called here, for a guest's panic. Why it ends it says by a trace event on standard error, which is the log::

    1234@1700000000.123456:qemu_system_shutdown_request reason=6

so that it can be told, too, where nobody could wait for the process. The numbers are those of ``ShutdownCause`` in
QEMU's run-state.json: new ones are added at its end.
"""

import re
import signal
from enum import IntEnum

from hypervisor.agent.drivers.microvm.vmm import End
from hypervisor.core.names import shorten

__all__ = ["explain_end", "last_words"]

_SHUTDOWN = re.compile(r"(?:^|:)qemu_system_shutdown_request reason=(\d+)\s*$", re.MULTILINE)
_TRACE = re.compile(r"^(?:\d+@[\d.]+:)?qemu_\w+ \w+=")
_PREFIX = re.compile(r"^\S*qemu-system-\w+: (?:warning: )?")
_BY_SIGNAL = 128
_TELLS = 200


class _Cause(IntEnum):
    HOST_ERROR = 1
    HOST_QMP_QUIT = 2
    HOST_SIGNAL = 4
    GUEST_SHUTDOWN = 6
    GUEST_RESET = 7
    GUEST_PANIC = 8


_ORDERLY = (_Cause.HOST_QMP_QUIT, _Cause.HOST_SIGNAL, _Cause.GUEST_SHUTDOWN, _Cause.GUEST_RESET)


def explain_end(log: str, exit_code: int | None) -> End:
    """How the run ended. ``log``: the end of what the process said; ``exit_code``: None where it is not known."""
    causes = _SHUTDOWN.findall(log)
    cause = int(causes[-1]) if causes else None
    if exit_code is not None and exit_code > _BY_SIGNAL:
        return End(True, exit_code, _by_signal(exit_code - _BY_SIGNAL, last_words(log)))
    if cause == _Cause.GUEST_PANIC:
        return End(
            True,
            1 if exit_code is None else exit_code,
            "the guest's kernel panicked: see the end of its console",
        )
    if exit_code == 0 or (cause in _ORDERLY and not exit_code):
        by_host = cause in (_Cause.HOST_SIGNAL, _Cause.HOST_QMP_QUIT)
        return End(False, 0, "QEMU was told to end" if by_host else "the guest ended")
    words = last_words(log)
    if exit_code is None:
        return End(
            True, None, f"QEMU ended without saying why{f'; its last words: {words}' if words else ''}"
        )
    return End(True, exit_code, f"QEMU ended with an error: {words or f'exit code {exit_code}'}")


def last_words(log: str) -> str:
    """The last line of the log that QEMU wrote for people, shortened; empty where there is none."""
    for line in reversed(log.splitlines()):
        text = line.strip()
        if text and not _TRACE.match(text):
            return shorten(_PREFIX.sub("", text), _TELLS).strip("'\"")
    return ""


def _by_signal(number: int, words: str) -> str:
    name = _signal_name(number)
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return f"QEMU was ended by {name}"
    return f"QEMU crashed ({name}){f': {words}' if words else ''}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
