"""From a counter that only rises to a rate. Pure."""

__all__ = ["Rate"]

_MIN_SPAN_S = 1.0


class Rate:
    """The mean rate of a counter between samples at least a second apart.

    Samples that come sooner get the last rate again: over a few milliseconds a rate would be noise.
    """

    def __init__(self) -> None:
        self._at: float | None = None
        self._count = 0
        self._rate: float | None = None

    def update(self, at_s: float, count: int) -> float | None:
        """The rate per second, from a monotonic time and the counter's value then; None while there is only one."""
        if self._at is None or count < self._count:
            # The first sample, or a counter that began again: nothing to compare with.
            self._at, self._count, self._rate = at_s, count, None
        elif at_s - self._at >= _MIN_SPAN_S:
            self._rate = (count - self._count) / (at_s - self._at)
            self._at, self._count = at_s, count
        return self._rate
