"""Firecracker's API: HTTP with JSON over the unix socket of one VMM. See its firecracker.yaml for what is sent."""

import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from hypervisor.core.clock import Clock
from hypervisor.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    ResourceExhausted,
    Unavailable,
)
from hypervisor.core.names import shorten

__all__ = ["FirecrackerApi", "parse_error"]

_POLL_S = 0.001
_HOST = "http://localhost"


class FirecrackerApi:
    """A connection, for ``async with``: several requests in a row go over it.

    The socket is reached by its directory, so that its path may be longer than the 107 bytes a socket's may have.
    ``timeout_s``: of each request.
    """

    def __init__(self, path: Path, *, clock: Clock, timeout_s: float = 10.0) -> None:
        self._socket = path
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._directory = -1
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "FirecrackerApi":
        try:
            self._directory = os.open(self._socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise self._unreachable(exc) from exc
        path = f"/proc/self/fd/{self._directory}/{self._socket.name}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path, limit=1),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    async def ready(self) -> None:
        """Return once the VMM that was just started listens. Waits for ever: the caller bounds it."""
        while not (self._is_there() and self._listens()):
            await self._clock.sleep(_POLL_S)

    def _listens(self) -> bool:
        """A socket has its name a moment before it takes connections."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            return probe.connect_ex(f"/proc/self/fd/{self._directory}/{self._socket.name}") == 0

    def _is_there(self) -> bool:
        try:
            return stat.S_ISSOCK(
                os.stat(self._socket.name, dir_fd=self._directory, follow_symlinks=False).st_mode
            )
        except FileNotFoundError:
            return False

    async def get(self, path: str) -> Any:
        """What it answers, as plain values."""
        return await self._request("GET", path, None)

    async def put(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> None:
        """Set or do something. ``FailedPrecondition`` (``VMM_REFUSED``) with its reason."""
        await self._request("PUT", path, body, timeout_s)

    async def patch(self, path: str, body: Mapping[str, Any]) -> None:
        """Change something."""
        await self._request("PATCH", path, body)

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None = None
    ) -> Any:
        assert self._session is not None, "use it by `async with`"
        if not self._is_there():
            raise self._unreachable(FileNotFoundError("its socket is not there"))
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            data = msgspec.json.encode(body)
            headers["Content-Type"] = "application/json"
        timeout = self._timeout if timeout_s is None else aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, _HOST + path, data=data, headers=headers, timeout=timeout
            ) as answer:
                text = await answer.read()
                status = answer.status
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"Firecracker did not answer {method} {path} in time: its host is overloaded, or it hangs",
                reason="VMM_TIMEOUT",
                metadata={"request": f"{method} {path}"},
            ) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise self._unreachable(exc) from exc
        if status >= 400:
            raise parse_error(text, request=f"{method} {path}", status=status)
        if not text:
            return None
        try:
            return msgspec.json.decode(text)
        except msgspec.MsgspecError as exc:
            raise Unavailable(
                f"Firecracker answered {method} {path} with what is no JSON: {shorten(repr(text[:100]))}",
                reason="VMM_UNREACHABLE",
            ) from exc

    def _unreachable(self, exc: Exception) -> Unavailable:
        return Unavailable(
            f"Firecracker does not answer at its socket ({exc}): it has ended, or has not begun yet",
            reason="VMM_UNREACHABLE",
            metadata={"socket": self._socket.name},
        )


def parse_error(text: bytes, *, request: str, status: int) -> HypervisorError:
    """The error an answer tells. Firecracker has two forms: ``fault_message`` for what it refuses, ``error`` for what
    is no request of its."""
    message = ""
    try:
        answer = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        answer = None
    if isinstance(answer, dict):
        message = str(answer.get("fault_message") or answer.get("error") or "")
    message = message or text.decode("utf-8", errors="replace") or f"status {status}"
    metadata = {"request": request, "cause": shorten(message, 500)}
    if "No space left on device" in message or "os error 28" in message:
        return ResourceExhausted(
            f"Firecracker could not write to the node's disk: {shorten(message, 500)}: free some space",
            reason="DISK_FULL",
            metadata=metadata,
        )
    return FailedPrecondition(
        f"Firecracker refused {request}: {shorten(message, 500)}", reason="VMM_REFUSED", metadata=metadata
    )
