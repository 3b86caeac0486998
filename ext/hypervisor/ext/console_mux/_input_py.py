"""The bounded queue of typed bytes of one console; the specification of the native one."""

from hypervisor.ext.console_mux._types import INPUT_QUEUE_BYTES
from hypervisor.ext.console_mux.frames import MAX_INPUT_BYTES

__all__ = ["InputQueue"]


class InputQueue:
    """Writes in the order they came. One of at most ``MAX_INPUT_BYTES`` goes in whole or not at all, so that writers
    do not cut each other's; a longer one goes in as far as there is room."""

    def __init__(self) -> None:
        self.data = bytearray()

    @property
    def room(self) -> int:
        """Bytes that still go in."""
        return INPUT_QUEUE_BYTES - len(self.data)

    @property
    def has_much_room(self) -> bool:
        """Whether writers that were refused are to be told to try again."""
        return self.room >= INPUT_QUEUE_BYTES // 2

    def offer(self, data: bytes) -> int:
        """Return how many bytes of ``data`` went in."""
        room = self.room
        if len(data) <= MAX_INPUT_BYTES and len(data) > room:
            return 0
        self.data += data[:room]
        return min(len(data), room)

    def took(self, count: int) -> None:
        """The guest took the oldest ``count`` bytes."""
        del self.data[:count]
