"""What happened, in order: the newest events for people, a digest of all for telling two runs apart."""

import hashlib
from collections import deque
from typing import Any

import structlog

from hvsim.loop import PROCESS, SimLoop

__all__ = ["Trace", "Violation"]

_SHOWN = 3000


class Violation(AssertionError):
    """Something that must hold does not."""


class Trace:
    """Events of one run. While :meth:`listen` is in force the product's log goes here."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._digest = hashlib.blake2b(digest_size=16)
        self.newest: deque[str] = deque(maxlen=_SHOWN)
        self.count = 0
        self.defects: list[str] = []
        """What a part of the product logged with a traceback: a defect, wherever it was contained."""

    def add(self, what: str) -> None:
        """Something happened now."""
        process = PROCESS.get()
        line = f"{self._loop.time():10.4f} {process.name if process else '-':<8} {what}"
        self._digest.update(line.encode())
        self.newest.append(line)
        self.count += 1

    def digest(self) -> str:
        """Tells runs apart."""
        return self._digest.hexdigest()

    def listen(self) -> None:
        """Take the product's log."""
        structlog.reset_defaults()
        structlog.configure(
            processors=[self._logged],
            wrapper_class=structlog.make_filtering_bound_logger(20),
            logger_factory=structlog.ReturnLoggerFactory(),
            cache_logger_on_first_use=False,
        )

    def _logged(self, _: Any, level: str, event: Any) -> Any:
        name = event.pop("event")
        failure = event.pop("exc_info", None)
        if failure:
            import sys
            import traceback

            exc = failure if isinstance(failure, BaseException) else sys.exc_info()[1]
            text = "".join(traceback.format_exception(exc)) if exc is not None else ""
            self.defects.append(f"{name} {event}\n{text}")
        self.add(f"{level[0]} {name} {' '.join(f'{key}={value}' for key, value in event.items())}")
        raise structlog.DropEvent
