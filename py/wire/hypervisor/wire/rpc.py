"""What happens around every call a program serves: who calls, request id, errors to gRPC status, metrics, access log.

Each method is wrapped once, when its service is registered: an interceptor would cost every call a second trip
through grpc.aio's machinery. A handler gets the decoded request and a :class:`Call`, returns a message (or bytes that
are one already) and raises ``HypervisorError``; none touches grpc's context. Server and agent both use it.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hypervisor.core.errors import HypervisorError, Internal, InvalidArgument, Unavailable
from hypervisor.core.grpc_errors import code_of, to_status, trailing_metadata
from hypervisor.core.ids import IdSource

__all__ = ["REQUEST_ID_KEY", "Authenticate", "Call", "CallMetrics", "Dispatcher", "Handler", "Reply"]

REQUEST_ID_KEY = "x-request-id"
_MAX_REQUEST_ID = 128

Reply = Message | bytes
"""An answer: a message, or one that is encoded already."""

Handler = Callable[[Any, Any], Awaitable[Reply]] | Callable[[Any, Any], AsyncIterator[Reply]]
"""A coroutine function for a single answer, an async generator function for a stream of them. The first argument is
the request, or an async iterator of requests where the client streams; the second is the :class:`Call`, of the class
that the dispatcher was given."""

Authenticate = Callable[[Any], str]
"""The name of who calls, by the :class:`Call`; raises Unauthenticated or PermissionDenied."""

_Context = grpc.aio.ServicerContext[Any, Any]
_OK, _CANCELLED = grpc.StatusCode.OK.name, grpc.StatusCode.CANCELLED.name
_log = structlog.get_logger(__name__)


class CallMetrics(Protocol):
    """Where finished calls are counted."""

    def observer(self, method: str) -> Callable[[str, float], None]:
        """A function of one method that takes the name of the status code and the seconds it took."""
        ...


class Call:
    """One call: who makes it and what came with it. ``own_id`` names it if the caller did not."""

    __slots__ = ("_context", "_headers", "principal", "request_id")

    def __init__(self, context: _Context, own_id: str) -> None:
        self._context = context
        self._headers = context.invocation_metadata() or ()
        self.principal = ""
        given = self.header(REQUEST_ID_KEY)
        usable = given is not None and 0 < len(given) <= _MAX_REQUEST_ID and given.isprintable()
        self.request_id = given if given is not None and usable else own_id

    def header(self, name: str) -> str | None:
        """The text value of a metadata key, or None."""
        for key, value in self._headers:
            if key == name and isinstance(value, str):
                return value
        return None

    def certificate_name(self) -> str | None:
        """Common name of the verified client certificate, or None."""
        names: list[bytes] = list(self._context.auth_context().get("x509_common_name", ()))
        return names[0].decode("utf-8", "replace") if names else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        return self._context.time_remaining()


class _Malformed:
    """Stands for a request that is no valid message, from the decoder (which cannot answer) to the wrapper."""

    def __init__(self, message_name: str) -> None:
        self.error = InvalidArgument(
            f"the request is not a valid {message_name}: is the client's version compatible?",
            reason="MALFORMED_MESSAGE",
            metadata={"message": message_name},
        )


def _decoder(method: MethodDescriptor) -> Callable[[bytes], object]:
    decode = GetMessageClass(method.input_type).FromString
    name = method.input_type.full_name

    def decode_or_mark(data: bytes) -> object:
        try:
            return decode(data)
        except DecodeError:
            return _Malformed(name)

    return decode_or_mark


def _encode(reply: Reply) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


async def _each_checked(requests: AsyncIterator[object]) -> AsyncIterator[object]:
    async for request in requests:
        yield _checked(request)


def _checked(request: object) -> object:
    if isinstance(request, _Malformed):
        raise request.error
    return request


async def _write_all(replies: Any, context: _Context) -> None:
    # A coroutine that writes, not a generator: a cancelled client is then raised here and nowhere else, so that the
    # handler's generator is closed at once and not when the garbage collector finds it.
    async with aclosing(replies):
        async for reply in replies:
            await context.write(reply)


class Dispatcher:
    """Registers services and watches over their calls in progress.

    ``stopping`` is the error of calls that the program's end cuts off; ``call_type`` the class of what handlers get.
    """

    def __init__(
        self,
        *,
        authenticate: Authenticate,
        metrics: CallMetrics | None,
        new_id: IdSource,
        stopping: Callable[[], Unavailable],
        call_type: type[Call] = Call,
    ) -> None:
        self._authenticate = authenticate
        self._metrics = metrics
        self._call_type = call_type
        # A fresh id for every call would cost more than the rest of this module: one for the process, and a number.
        self._id_base = new_id("r")
        self._numbers = itertools.count(1)
        self._stopping_error = stopping
        self._streams: set[asyncio.Task[Any]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._cut_off: set[asyncio.Task[Any]] = set()
        self._stopping = False

    def service(
        self, descriptor: ServiceDescriptor, handlers: Mapping[str, Handler]
    ) -> "grpc.GenericRpcHandler":
        """The service, for ``server.add_generic_rpc_handlers``.

        TypeError unless there is a handler for each of its methods and for nothing else: no method is forgotten.
        """
        wanted = {method.name for method in descriptor.methods}
        if wanted != set(handlers):
            differing = sorted(wanted ^ set(handlers))
            raise TypeError(f"{descriptor.full_name}: handlers and methods differ: {', '.join(differing)}")
        return grpc.method_handlers_generic_handler(
            descriptor.full_name,
            {method.name: self._method(method, handlers[method.name]) for method in descriptor.methods},
        )

    @property
    def in_progress(self) -> int:
        """Calls and streams being served now."""
        return len(self._calls) + len(self._streams)

    def stop_streams(self) -> None:
        """End every stream with UNAVAILABLE, and those that begin from now on."""
        self._stopping = True
        self._cut(self._streams)

    def stop_calls(self) -> None:
        """End the calls still in progress the same way, at the end of the grace time."""
        self._cut(self._calls)

    def _cut(self, tasks: set[asyncio.Task[Any]]) -> None:
        for task in tasks - self._cut_off:
            self._cut_off.add(task)
            task.cancel()

    def _method(self, method: MethodDescriptor, handler: Handler) -> "grpc.RpcMethodHandler[Any, Any]":
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        made: grpc.RpcMethodHandler[Any, Any] = make(
            self._guard(method, handler), request_deserializer=_decoder(method), response_serializer=_encode
        )
        return made

    def _guard(self, method: MethodDescriptor, handler: Any) -> Callable[[Any, _Context], Any]:
        observe = self._metrics.observer(method.name) if self._metrics is not None else None
        tasks = self._streams if method.server_streaming else self._calls
        streams_in, streams_out, name = method.client_streaming, method.server_streaming, method.name
        call_type, authenticate = self._call_type, self._authenticate
        id_base, numbers = self._id_base, self._numbers
        log = _log.bind()
        debug = log.is_enabled_for(logging.DEBUG)

        async def guarded(request: Any, context: _Context) -> Reply | None:
            started = time.perf_counter()
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            call = call_type(context, f"{id_base}-{next(numbers)}")
            # grpc.aio serves every call in a task of its own: what is bound here ends with the call.
            structlog.contextvars.bind_contextvars(request_id=call.request_id)
            code = _OK
            error: HypervisorError
            try:
                call.principal = authenticate(call)
                if streams_out and self._stopping:
                    raise self._stopping_error()
                checked = _each_checked(request) if streams_in else _checked(request)
                if streams_out:
                    await _write_all(handler(checked, call), context)
                    return None
                reply: Reply = await handler(checked, call)
                return reply
            except asyncio.CancelledError:
                if task not in self._cut_off:
                    code = _CANCELLED
                    raise
                task.uncancel()
                error = self._stopping_error()
                code = code_of(error).name
            except HypervisorError as exc:
                error = exc
                code = code_of(exc).name
                if isinstance(exc, Internal):
                    log.exception("rpc_failed", method=name, principal=call.principal)
            except grpc.aio.AbortError:
                raise
            except Exception as exc:  # a defect of ours: logged here, withheld from the caller
                if streams_out and context.done():
                    # The client went away between two writes; grpc.aio says so by an error of the write.
                    code = _CANCELLED
                    return None
                error = Internal(f"{type(exc).__name__} in {name}")
                code = code_of(error).name
                log.exception("rpc_failed", method=name, principal=call.principal)
            finally:
                tasks.discard(task)
                self._cut_off.discard(task)
                elapsed = time.perf_counter() - started
                if observe is not None:
                    observe(code, elapsed)
                if debug:
                    log.debug(
                        "rpc", method=name, code=code, principal=call.principal, ms=round(elapsed * 1000, 3)
                    )
            status = to_status(error)
            trailers: tuple[tuple[str, str | bytes], ...] = (
                (REQUEST_ID_KEY, call.request_id),
                *trailing_metadata(status),
            )
            await context.abort(code_of(error), status.message, trailers)
            raise AssertionError("abort returned")

        return guarded
