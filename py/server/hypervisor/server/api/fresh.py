"""What another server has just recorded is not "not there": before NOT_FOUND is answered, the view catches up and the
call is looked at once more.

A call that ends with NOT_FOUND has changed nothing, so it may be served again.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from hypervisor.core.errors import NotFound
from hypervisor.server.api.rpc import Call, Handler, Reply

__all__ = ["CatchUp", "looking_again"]

CatchUp = Callable[[], Awaitable[bool]]
"""Has the view reach what the store holds now; whether it had not. Raises Unavailable where that cannot be had."""


def looking_again(handlers: Mapping[str, Handler], catch_up: CatchUp) -> dict[str, Handler]:
    """The handlers; those of single calls look again before they say NOT_FOUND. Streams stay as they are."""
    return {
        name: _again(handler, catch_up) if inspect.iscoroutinefunction(handler) else handler
        for name, handler in handlers.items()
    }


def _again(handler: Callable[[Any, Call], Awaitable[Reply]], catch_up: CatchUp) -> Handler:
    async def handle(request: Any, call: Call) -> Reply:
        try:
            return await handler(request, call)
        except NotFound:
            if not await catch_up():
                raise
        return await handler(request, call)

    return handle
