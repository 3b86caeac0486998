"""The calls of this server's API: ``wire.rpc`` with its authenticators, and callers as the services know them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio

from hypervisor.core.errors import Unavailable
from hypervisor.core.ids import IdSource
from hypervisor.server.auth import Authenticator
from hypervisor.server.services import Caller
from hypervisor.wire import rpc
from hypervisor.wire.rpc import CallMetrics, Reply

__all__ = ["Call", "Dispatcher", "Handler", "Reply"]

Handler = Callable[[Any, "Call"], Awaitable[Reply]] | Callable[[Any, "Call"], AsyncIterator[Reply]]
"""See ``wire.rpc.Handler``."""


class Call(rpc.Call):
    """One call: who makes it and what came with it. Also the ``Credentials`` that authenticators look at."""

    __slots__ = ("_caller",)

    def __init__(self, context: "grpc.aio.ServicerContext[Any, Any]", own_id: str) -> None:
        super().__init__(context, own_id)
        self._caller: Caller | None = None

    @property
    def caller(self) -> Caller:
        """What the services know of the caller."""
        if self._caller is None:
            self._caller = Caller(principal=self.principal, request_id=self.request_id)
        return self._caller


class Dispatcher(rpc.Dispatcher):
    """See ``wire.rpc.Dispatcher``."""

    def __init__(self, *, authenticator: Authenticator, metrics: CallMetrics, new_id: IdSource) -> None:
        def authenticate(call: Call) -> str:
            return authenticator.authenticate(call).name

        super().__init__(
            authenticate=authenticate,
            metrics=metrics,
            new_id=new_id,
            stopping=_stopping_error,
            call_type=Call,
        )


def _stopping_error() -> Unavailable:
    return Unavailable(
        "this server is stopping: repeat the call (with its request_id, if it changes something)",
        reason="SERVER_STOPPING",
        retry_after_s=1.0,
    )
