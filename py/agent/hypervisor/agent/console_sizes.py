"""Which size a terminal gets while several viewers have one: the rule of ConsoleInput.ResizePolicy. No I/O."""

from hypervisor.core.model import ConsoleSize

__all__ = ["ConsoleSizes"]


class ConsoleSizes:
    """Of one console. Viewers are any hashable objects. Each method returns the size to set, None to leave it."""

    def __init__(self) -> None:
        self._free: ConsoleSize | None = None
        """The last size that a viewer without a fixed one sent."""
        self._fixed: dict[object, ConsoleSize] = {}
        """In the order they came."""

    @property
    def current(self) -> ConsoleSize | None:
        """What counts now; None before the first."""
        return next(reversed(self._fixed.values()), self._free)

    def fix(self, viewer: object, size: ConsoleSize) -> ConsoleSize | None:
        """The viewer's size is to stay while it is there."""
        before = self.current
        self._fixed[viewer] = size
        return self._changed(before)

    def resize(self, viewer: object, size: ConsoleSize) -> ConsoleSize | None:
        """A viewer's terminal has this size now."""
        before = self.current
        if viewer in self._fixed:
            self._fixed[viewer] = size
            return self._changed(before)
        self._free = size
        # The last one wins also where it says the same again: the guest may have changed it meanwhile.
        return None if self._fixed else size

    def leave(self, viewer: object) -> ConsoleSize | None:
        """A viewer is gone."""
        before = self.current
        self._fixed.pop(viewer, None)
        return self._changed(before)

    def _changed(self, before: ConsoleSize | None) -> ConsoleSize | None:
        return None if self.current == before else self.current
