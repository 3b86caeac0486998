"""One channel over several servers: every call goes to the one in use, until the caller says that it fails.

Any server answers any call, so which one is used matters to nobody. Stubs are made once, on this channel; what they
call finds the server when it is called, so that a repeat after :meth:`Failover.advance` reaches another one.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc

__all__ = ["Failover"]


class Failover(grpc.Channel):
    """``connect`` makes the channel of an address; channels are made when they are first needed, and kept."""

    def __init__(self, addresses: Sequence[str], connect: Callable[[str], grpc.Channel]) -> None:
        self._addresses = tuple(addresses)
        self._connect = connect
        self._channels: dict[str, grpc.Channel] = {}
        self._used = 0
        # Commands about many objects call from several threads.
        self._lock = threading.RLock()

    @property
    def address(self) -> str:
        """The server in use."""
        return self._addresses[self._used]

    def advance(self, past: str) -> None:
        """Use the server after ``past``, unless another caller has moved on from there already."""
        with self._lock:
            if self.address == past:
                self._used = (self._used + 1) % len(self._addresses)

    def current(self) -> grpc.Channel:
        """The channel to the server in use."""
        with self._lock:
            channel = self._channels.get(self.address)
            if channel is None:
                channel = self._channels[self.address] = self._connect(self.address)
            return channel

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A call that finds its server when it is made."""
        return _Call(self, "unary_unary", method, arguments, options)

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A call that finds its server when it is made."""
        return _Call(self, "unary_stream", method, arguments, options)

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A call that finds its server when it is made."""
        return _Call(self, "stream_unary", method, arguments, options)

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A call that finds its server when it is made."""
        return _Call(self, "stream_stream", method, arguments, options)

    def subscribe(self, callback: Any, try_to_connect: Any = False) -> None:
        """Of the server in use now."""
        self.current().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        """Of the server in use now."""
        self.current().unsubscribe(callback)

    def close(self) -> None:
        """Close every channel that was made."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def __enter__(self) -> "Failover":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Call:
    """What a stub calls: gRPC's own callable of the channel that is in use."""

    def __init__(
        self,
        failover: Failover,
        kind: str,
        method: str,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self._failover = failover
        self._make: Callable[[grpc.Channel], Any] = lambda channel: getattr(channel, kind)(
            method, *arguments, **options
        )
        self._made: dict[grpc.Channel, Any] = {}

    def _callable(self) -> Any:
        channel = self._failover.current()
        made = self._made.get(channel)
        if made is None:
            made = self._made[channel] = self._make(channel)
        return made

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._callable()(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callable(), name)
