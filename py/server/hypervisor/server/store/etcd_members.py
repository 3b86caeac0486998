"""Connections to the members of an etcd cluster: which one to use, when to leave it, when to dial anew.

One channel for each endpoint and one endpoint in use at a time; when it fails, the next one is tried. A
channel whose connection went silent is replaced rather than waited for: the new one dials at once, the old
one is closed when its last user has gone.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
import structlog
from etcdserverpb import rpc_pb2_grpc

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, InvalidArgument, Unavailable
from hypervisor.server.store.etcd_errors import translate, unreachable
from hypervisor.server.store.validation import store_closed

__all__ = ["EtcdMembers", "Member", "parse_endpoint"]

T = TypeVar("T")

_PAUSE_S = 0.05

# Requests are limited by etcd (1.5 MiB); responses by what we ask for. The pool of connections must not be
# shared between channels, or a replaced channel would inherit the silent connection of the one before.
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
)

log = structlog.get_logger(__name__)


def parse_endpoint(endpoint: str, *, tls: bool) -> str:
    """``host:port`` of an endpoint with or without a scheme; raises ``InvalidArgument``."""
    scheme, separator, rest = endpoint.rpartition("://")
    if separator and scheme != ("https" if tls else "http"):
        raise InvalidArgument.of_field(
            "store.endpoints",
            f"{endpoint!r} does not fit the TLS setting: "
            + ("use https:// or no scheme" if tls else "set tls, or use http:// or no scheme"),
        )
    host, _, port = rest.rstrip("/").rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidArgument.of_field("store.endpoints", f"{endpoint!r} must be host:port")
    return f"{host}:{port}"


class Member:
    """One channel to one endpoint, with its stubs."""

    def __init__(self, endpoint: str, channel: grpc.aio.Channel) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self.kv = rpc_pb2_grpc.KVStub(channel)
        self.watch = rpc_pb2_grpc.WatchStub(channel)
        self.lease = rpc_pb2_grpc.LeaseStub(channel)
        self.maintenance = rpc_pb2_grpc.MaintenanceStub(channel)
        self.users = 0
        self.retired = False


@dataclass(frozen=True, slots=True)
class _Dial:
    """How to make a channel."""

    credentials: grpc.ChannelCredentials | None
    server_name: str

    def __call__(self, endpoint: str) -> Member:
        options: list[tuple[str, int | str]] = list(_OPTIONS)
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        if self.credentials is None:
            return Member(endpoint, grpc.aio.insecure_channel(endpoint, options=options))
        return Member(endpoint, grpc.aio.secure_channel(endpoint, self.credentials, options=options))


class EtcdMembers:
    """The members, one of them current. Close with ``aclose``, which ends all calls with ``STORE_CLOSED``."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None,
        server_name: str = "",
        dial_timeout_s: float,
        request_timeout_s: float,
        clock: Clock,
    ) -> None:
        self._dial = _Dial(credentials, server_name)
        self._endpoints = ",".join(endpoints)
        self._members = [self._dial(endpoint) for endpoint in endpoints]
        self._retired: set[Member] = set()
        self._current = 0
        self._dial_timeout_s = dial_timeout_s
        self._clock = clock
        self._closed = False
        self.request_timeout_s = request_timeout_s

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Member]:
        """A member with a connection that stands. Raises ``Unavailable`` when none can be reached in the dial
        time-out; nothing was sent then."""
        member = await self._connect()
        member.users += 1
        try:
            yield member
        except asyncio.CancelledError:
            # Closing a channel cancels its calls, which is not a cancellation of the task that awaits them.
            task = asyncio.current_task()
            if self._closed and (task is None or not task.cancelling()):
                raise store_closed() from None
            raise
        finally:
            member.users -= 1
            if member.retired and member.users == 0:
                self._retired.discard(member)
                await member.channel.close(None)

    def failed(self, member: Member, *, silent: bool) -> None:
        """Try another member next. ``silent``: the connection gave no answer at all, so do not use it
        again."""
        index = next((n for n, m in enumerate(self._members) if m is member), None)
        if index is None or self._closed:
            return
        if silent:
            member.retired = True
            self._retired.add(member)
            self._members[index] = self._dial(member.endpoint)
        if index == self._current:
            self._current = (index + 1) % len(self._members)

    async def repeat(self, request: Callable[[Member, float], Awaitable[T]]) -> T:
        """Await ``request(member, timeout_s)`` on one member after another until one answers.

        Only for requests that are safe to repeat. ``request`` may raise ``grpc.aio.AioRpcError``; it is
        raised from here as an error of ours: at once, or for ``Unavailable`` after the request time-out.
        """
        deadline = self._clock.monotonic() + self.request_timeout_s
        while True:
            async with self.connected() as member:
                remaining = max(deadline - self._clock.monotonic(), _PAUSE_S)
                try:
                    # Half of what is left, so that one silent member leaves time for another.
                    return await request(member, max(remaining / 2, min(remaining, 0.5)))
                except grpc.aio.AioRpcError as exc:
                    error = translate(exc, member.endpoint)
                    if not isinstance(error, Unavailable):
                        raise error from exc
                    self.failed(member, silent=exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED)
                    if self._clock.monotonic() + _PAUSE_S >= deadline:
                        raise error from exc
                    log.info("store_request_repeated", endpoint=member.endpoint, status=exc.code().name)
            await self._clock.sleep(_PAUSE_S)

    def check_open(self) -> None:
        """Raise ``Unavailable`` (``STORE_CLOSED``) after ``aclose``."""
        if self._closed:
            raise store_closed()

    async def aclose(self) -> None:
        """Close all channels. Idempotent."""
        self._closed = True
        for member in (*self._members, *self._retired):
            await member.channel.close(None)

    async def _connect(self) -> Member:
        self.check_open()
        member = self._members[self._current]
        if member.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
            return member
        try:
            async with asyncio.timeout(self._dial_timeout_s):
                return await self._connect_any()
        except TimeoutError:
            self.check_open()
            raise self._unreachable() from None

    def _unreachable(self) -> HypervisorError:
        states = {m.channel.get_state().name.lower().replace("_", " ") for m in self._members}
        return unreachable(self._endpoints, self._dial_timeout_s, ", ".join(sorted(states)))

    async def _connect_any(self) -> Member:
        """Go round the members until one is connected; a refusal moves on at once, silence after its
        share."""
        while True:
            member = self._members[self._current]
            share = self._dial_timeout_s / (2 * len(self._members))
            try:
                async with asyncio.timeout(share):
                    if await self._becomes_ready(member):
                        return member
            except TimeoutError:
                pass
            self.check_open()
            self._current = (self._current + 1) % len(self._members)
            await self._clock.sleep(_PAUSE_S)

    async def _becomes_ready(self, member: Member) -> bool:
        while True:
            state = member.channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                return True
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                return False
            await member.channel.wait_for_state_change(state)
