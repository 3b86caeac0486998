"""The connection to libvirt: blocking calls on threads of its own, events handed to the event loop, loss noticed.

libvirt's library blocks and calls back on whatever thread runs its event loop. Calls therefore go to two small pools of
threads (those that change something may take long, and must not hold up those that only look), and one thread per
process runs libvirt's own event loop for ever. Nothing of libvirt ever runs on asyncio's thread.

A connection is opened when it is first needed and again after it was lost. It is lost when libvirtd ends, and when it
no longer answers to the keep-alives that libvirt's event loop sends; calls that wait then end with an error too.
"""

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import libvirt
import structlog

from hypervisor.agent.drivers.libvirt.failures import connection_is_lost, translated
from hypervisor.core.errors import DeadlineExceeded, Unavailable

__all__ = ["Connection", "DomainEvent", "Session"]

T = TypeVar("T")

_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3
_OPEN_TIMEOUT_S = 8.0
_QUERY_THREADS = 2
_ACTION_THREADS = 8

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """Something happened to a domain: ``event`` and ``detail`` are libvirt's (``VIR_DOMAIN_EVENT_STOPPED`` ...)."""

    name: str
    event: int
    detail: int


class _EventLoop:
    """libvirt's event loop, on one thread of this process from the first connection to the end of the process."""

    _lock = threading.Lock()
    _thread: threading.Thread | None = None

    @classmethod
    def ensure(cls) -> None:
        """Start it; only once, and before the first connection is opened."""
        with cls._lock:
            if cls._thread is None:
                # What goes wrong is raised as well; libvirt would print it to standard error besides.
                libvirt.registerErrorHandler(lambda *_: None, None)
                libvirt.virEventRegisterDefaultImpl()
                cls._thread = threading.Thread(target=cls._run, name="libvirt-events", daemon=True)
                cls._thread.start()

    @staticmethod
    def _run() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError as exc:
                _log.warning("libvirt_event_loop_failed", error=str(exc))


class Session:
    """One open connection; ``lost`` is set once it is of no more use."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.lost = asyncio.Event()
        self.subscription: int | None = None


class Connection:
    """See the module's docstring. ``listener`` gets what happens to domains, on the event loop; it must not block."""

    def __init__(self, uri: str, *, listener: Callable[[DomainEvent], None]) -> None:
        self._uri = uri
        self._listener = listener
        self._session: Session | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._queries = ThreadPoolExecutor(_QUERY_THREADS, thread_name_prefix="libvirt-query")
        self._actions = ThreadPoolExecutor(_ACTION_THREADS, thread_name_prefix="libvirt-action")

    @property
    def uri(self) -> str:
        """libvirt's connection URI."""
        return self._uri

    async def session(self) -> Session:
        """The open connection, opened where there is none. ``Unavailable`` (``DRIVER_UNAVAILABLE``)."""
        async with self._opening:
            session = self._session
            if session is not None and not session.lost.is_set():
                return session
            if self._closed:
                raise Unavailable("the libvirt driver is closed", reason="DRIVER_UNAVAILABLE")
            if session is not None:
                await self._dispose(session)
            loop = asyncio.get_running_loop()
            opening = loop.run_in_executor(self._queries, self._open, loop)
            self._session = await self._within(
                opening, what=f"open {self._uri}", timeout_s=_OPEN_TIMEOUT_S, session=None
            )
            return self._session

    async def query(
        self, function: Callable[[Any], T], *, what: str, timeout_s: float = 10.0, instance_id: str = ""
    ) -> T:
        """Run ``function`` with the connection, on a thread; it only looks. ``what`` is for errors.

        Raises what :func:`translated` makes of libvirt's errors, ``DeadlineExceeded`` (``DRIVER_TIMEOUT``) when
        libvirt takes longer, and ``Unavailable`` (``DRIVER_UNAVAILABLE``) without a connection.
        """
        return await self._run(self._queries, function, what, timeout_s, instance_id)

    async def act(
        self, function: Callable[[Any], T], *, what: str, timeout_s: float = 60.0, instance_id: str = ""
    ) -> T:
        """As :meth:`query`, for what changes something."""
        return await self._run(self._actions, function, what, timeout_s, instance_id)

    async def aclose(self) -> None:
        """Close; guests run on. Idempotent."""
        self._closed = True
        async with self._opening:
            session, self._session = self._session, None
            if session is not None:
                session.lost.set()
                await self._dispose(session)
        self._queries.shutdown(wait=False, cancel_futures=True)
        self._actions.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self,
        pool: ThreadPoolExecutor,
        function: Callable[[Any], T],
        what: str,
        timeout_s: float,
        instance_id: str,
    ) -> T:
        session = await self.session()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(pool, function, session.connection)
        return await self._within(
            running, what=what, timeout_s=timeout_s, session=session, instance_id=instance_id
        )

    async def _within(
        self,
        running: "asyncio.Future[T]",
        *,
        what: str,
        timeout_s: float,
        session: Session | None,
        instance_id: str = "",
    ) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await running
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"libvirt did not {what} within {timeout_s:g} s: look at libvirtd on the node",
                reason="DRIVER_TIMEOUT",
                metadata={"uri": self._uri},
            ) from exc
        except libvirt.libvirtError as exc:
            if session is not None and connection_is_lost(exc):
                session.lost.set()
            raise translated(exc, what=what, uri=self._uri, instance_id=instance_id) from exc

    def _open(self, loop: asyncio.AbstractEventLoop) -> Session:
        """On a thread."""
        _EventLoop.ensure()
        connection = libvirt.open(self._uri)
        session = Session(connection)

        def on_close(_: object, reason: int, __: object) -> None:
            _call(loop, session.lost.set)

        def on_lifecycle(_: object, domain: Any, event: int, detail: int, __: object) -> None:
            _call(loop, self._listener, DomainEvent(domain.name(), event, detail))

        connection.registerCloseCallback(on_close, None)
        try:
            connection.setKeepAlive(_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT)
        except libvirt.libvirtError as exc:
            # A connection without a daemon behind it (libvirt's own test driver) needs none.
            if exc.get_error_code() not in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_INVALID_CONN):
                raise
        session.subscription = connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, None
        )
        return session

    async def _dispose(self, session: Session) -> None:
        """Close a connection that is of no more use; one that does not even close is left to its thread."""
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(self._queries, _close, session)
        await asyncio.wait({closing}, timeout=2.0)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Hand a call to the loop, from libvirt's thread; one that has ended needs no more."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        _log.debug("libvirt_event_after_the_end")


def _close(session: Session) -> None:
    """Let go of everything; callbacks would keep the connection open."""
    connection = session.connection
    steps = [connection.unregisterCloseCallback, connection.close]
    if session.subscription is not None:
        steps.insert(0, functools.partial(connection.domainEventDeregisterAny, session.subscription))
    for step in steps:
        try:
            step()
        except libvirt.libvirtError as exc:
            _log.debug("libvirt_connection_not_closed", error=str(exc))
