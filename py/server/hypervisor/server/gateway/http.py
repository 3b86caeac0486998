"""The HTTP server: ``/healthz`` (alive), ``/readyz`` (may get calls), ``/metrics`` (Prometheus) and ``/images/sha256/``
(the content of images, for nodes: with ranges, and the digest as ETag).

Health is for everybody, as load balancers have no credentials; the rest is for those whom the API knows.
"""

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from hypervisor.core.errors import FailedPrecondition, Unauthenticated
from hypervisor.core.settings import split_address
from hypervisor.server.auth import Authenticator
from hypervisor.server.gateway.metrics import Metrics
from hypervisor.wire.image_http import BLOB_PATH

__all__ = ["HttpGateway"]

_PLAIN_PAGE = (
    "Hypervisor control plane.\n"
    "This version has no web interface and no REST API: use hypervisor-ctl, or gRPC.\n"
    "Here are /healthz, /readyz and /metrics, and the content of images for nodes.\n"
)


class _HttpCredentials:
    """``Credentials`` of an HTTP request."""

    def __init__(self, request: web.Request) -> None:
        self._request = request

    def header(self, name: str) -> str | None:
        return self._request.headers.get(name)

    def certificate_name(self) -> str | None:
        certificate = self._request.get_extra_info("peercert") or {}
        for attributes in certificate.get("subject", ()):
            for key, value in attributes:
                if key == "commonName":
                    return str(value)
        return None


class HttpGateway:
    """Enter it with ``async with`` to listen.

    ``unready`` says why calls should go elsewhere, or nothing; ``image_file`` where the content with a digest is, if it
    is here.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: ssl.SSLContext | None,
        authenticator: Authenticator,
        metrics: Metrics,
        unready: Callable[[], str],
        image_file: Callable[[str], Path | None],
    ) -> None:
        self._address = address
        self._tls = tls
        self._authenticator = authenticator
        self._metrics = metrics
        self._unready = unready
        self._image_file = image_file
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def __aenter__(self) -> "HttpGateway":
        app = web.Application()
        app.router.add_get("/", self._root)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics_text)
        app.router.add_get(f"{BLOB_PATH}{{digest:[0-9a-f]{{64}}}}", self._image)
        app.on_response_prepare.append(_digest_is_etag)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        host, port = split_address(self._address)
        try:
            await web.TCPSite(runner, host, port, ssl_context=self._tls).start()
        except OSError as exc:
            await runner.cleanup()
            raise FailedPrecondition(
                f"server.http_address {self._address} cannot be listened on: {exc.strerror or exc}",
                reason="ADDRESS_IN_USE",
                metadata={"address": self._address},
            ) from exc
        self._runner = runner
        self.port = int(runner.addresses[0][1])
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _root(self, _: web.Request) -> web.Response:
        return web.Response(text=_PLAIN_PAGE)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        why_not = self._unready()
        if why_not:
            return web.Response(status=503, text=f"not ready: {why_not}\n", headers={"Retry-After": "1"})
        return web.Response(text="ok\n")

    async def _image(self, request: web.Request) -> web.StreamResponse:
        refused = self._refused(request)
        if refused is not None:
            return refused
        path = await asyncio.to_thread(self._image_file, request.match_info["digest"])
        if path is None:
            return web.Response(status=404, text="this server does not have that content\n")
        # Whole and unchangeable once it has this name; the file is opened once, so a deletion does not cut it off.
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    def _refused(self, request: web.Request) -> web.Response | None:
        """The answer to a caller whom the API does not know."""
        try:
            self._authenticator.authenticate(_HttpCredentials(request))
        except Unauthenticated as exc:
            return web.Response(status=401, text=f"{exc.message}\n", headers={"WWW-Authenticate": "Bearer"})
        return None

    async def _metrics_text(self, request: web.Request) -> web.Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _digest_is_etag(request: web.Request, response: web.StreamResponse) -> None:
    digest = request.match_info.get("digest")
    if digest and response.status in (200, 206):
        response.headers["ETag"] = f'"{digest}"'
