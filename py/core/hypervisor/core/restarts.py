"""What is done about instances that end by themselves: the policy, how far it has come, and the decision. Pure.

The node does it by itself, whether a server can be reached or not. See RestartPolicy in instance.proto.
"""

from datetime import datetime, timedelta
from enum import StrEnum

import msgspec

__all__ = ["BACKOFF", "EXHAUSTED", "RestartCondition", "RestartPolicy", "Restarts"]

BACKOFF = "BACKOFF"
"""Status reason of an instance that has ended and waits to be started again."""
EXHAUSTED = "RESTARTS_EXHAUSTED"
"""Status reason of an instance that has ended as often in a row as its policy allows."""


class RestartCondition(StrEnum):
    """After which ends an instance is started again."""

    NEVER = "never"
    ON_FAILURE = "on_failure"
    ALWAYS = "always"


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Spans in seconds. ``max_restarts`` None: no limit."""

    condition: RestartCondition = RestartCondition.NEVER
    max_restarts: int | None = None
    initial_delay_s: float = 1.0
    max_delay_s: float = 60.0
    reset_after_s: float = 300.0

    @property
    def active(self) -> bool:
        """Whether it ever starts anything."""
        return self.condition is not RestartCondition.NEVER

    def covers(self, *, failed: bool) -> bool:
        """Whether it is about an end of this kind."""
        return self.condition is RestartCondition.ALWAYS or (
            failed and self.condition is RestartCondition.ON_FAILURE
        )

    def delay_s(self, count: int, jitter: float) -> float:
        """How long to wait after ``count`` restarts in a row. ``jitter``: 0.0 to 1.0; spreads over the upper half."""
        longest = min(self.initial_delay_s * 2.0 ** min(count, 63), self.max_delay_s)
        return longest * (0.5 + jitter / 2)


class Restarts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How often an instance was started again, and when it will be. Times by its node's clock.

    ``count`` is of restarts in a row, ``total`` of all on this node. ``last_*`` are about the last end that the policy
    was asked about.
    """

    count: int = 0
    total: int = 0
    next_at: datetime | None = None
    exhausted: bool = False
    last_at: datetime | None = None
    last_reason: str = ""
    last_exit_code: int | None = None

    @property
    def pending(self) -> bool:
        """Whether the end that was seen last has been decided about."""
        return self.next_at is not None or self.exhausted

    def ended(
        self,
        policy: RestartPolicy,
        *,
        reason: str,
        exit_code: int | None,
        ran: tuple[datetime | None, datetime | None],
        now: datetime,
        jitter: float,
    ) -> "Restarts":
        """A run ended that the policy is about. ``ran``: from when to when, where known."""
        began, over = ran
        # A restart that did not even come to a run leaves the times of the run before it.
        of_last_start = began is not None and (self.last_at is None or began >= self.last_at)
        healthy = (
            of_last_start
            and began is not None
            and ((over or now) - began).total_seconds() >= policy.reset_after_s
        )
        count = 0 if healthy else self.count
        exhausted = policy.max_restarts is not None and count >= policy.max_restarts
        wait = timedelta(seconds=policy.delay_s(count, jitter))
        return msgspec.structs.replace(
            self,
            count=count,
            next_at=None if exhausted else now + wait,
            exhausted=exhausted,
            last_reason=reason,
            last_exit_code=exit_code,
        )

    def begun(self, now: datetime) -> "Restarts":
        """It is being started again."""
        return msgspec.structs.replace(
            self, count=self.count + 1, total=self.total + 1, next_at=None, exhausted=False, last_at=now
        )

    def cancelled(self) -> "Restarts":
        """Somebody has decided about it: nothing waits, and counting begins anew."""
        return msgspec.structs.replace(self, count=0, next_at=None, exhausted=False)
