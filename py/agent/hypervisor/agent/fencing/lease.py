"""Until when servers count on this node.

The servers' lease is renewed while they handle a heartbeat, so it cannot end before its time to live has passed since
that heartbeat was *sent*: from there it is counted, on this machine's clock, which also counts while it is suspended.
"""

from pathlib import Path

import structlog

from hypervisor.agent.fencing.contact import CONTACT, Contact, ContactFile, boot_id, read_contact
from hypervisor.core.clock import Clock

__all__ = ["Lease"]

_log = structlog.get_logger(__name__)


class Lease:
    """This node's view of its lease; kept in ``directory`` over restarts of the agent (None: nowhere)."""

    def __init__(self, directory: Path | None, clock: Clock, *, boot: str | None = None) -> None:
        self._clock = clock
        self._boot = boot or boot_id()
        before = None if directory is None else read_contact(directory / CONTACT)
        same_boot = before is not None and before.boot == self._boot
        self.rebooted = before is not None and not same_boot
        """Whether the machine was started anew since an agent had contact."""
        self._until_s = before.until_s if before is not None and same_boot else float("-inf")
        self._disarmed = before.disarmed if before is not None else False
        self._time_to_live_s = float("inf")
        self._file = None if directory is None else ContactFile(directory / CONTACT)
        self._write()

    @property
    def disarmed(self) -> bool:
        """Whether the servers said that this node shall not fence itself."""
        return self._disarmed

    @property
    def until_s(self) -> float:
        """When it ends, in seconds of the clock's ``monotonic``."""
        return self._until_s

    @property
    def held(self) -> bool:
        """Whether it certainly has not ended."""
        return self._clock.monotonic() < self._until_s

    def registered(self, sent_s: float, *, time_to_live_s: float, disarmed: bool) -> None:
        """A registration sent at ``sent_s`` was answered: there is a new lease."""
        self._time_to_live_s = time_to_live_s
        self.answered(sent_s, time_to_live_s=time_to_live_s, disarmed=disarmed)

    def answered(self, sent_s: float, *, time_to_live_s: float, disarmed: bool) -> None:
        """A heartbeat sent at ``sent_s`` was answered. The lease lives as long as it was granted for, whatever a server
        that is configured otherwise says."""
        lives_s = min(time_to_live_s, self._time_to_live_s)
        if disarmed is not self._disarmed:
            _log.warning("fencing_disarmed" if disarmed else "fencing_armed")
        self._disarmed = disarmed
        self._until_s = max(self._until_s, sent_s + lives_s)
        self._write()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        if self._file is not None:
            self._file.write(Contact(self._boot, self._until_s, self._disarmed))
