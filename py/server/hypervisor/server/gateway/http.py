"""The HTTP server: ``/healthz`` (alive), ``/readyz`` (may get calls), ``/metrics`` (Prometheus).

Health is for everybody, as load balancers have no credentials; metrics are for those whom the API knows.
"""

import ssl
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from hypervisor.core.errors import FailedPrecondition, Unauthenticated
from hypervisor.core.settings import split_address
from hypervisor.server.auth import Authenticator
from hypervisor.server.gateway.metrics import Metrics

__all__ = ["HttpGateway"]

_PLAIN_PAGE = (
    "Hypervisor control plane.\n"
    "This version has no web interface and no REST API: use hypervisor-ctl, or gRPC.\n"
    "Here are /healthz, /readyz and /metrics.\n"
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
    """Enter it with ``async with`` to listen. ``unready`` says why calls should go elsewhere, or nothing."""

    def __init__(
        self,
        address: str,
        *,
        tls: ssl.SSLContext | None,
        authenticator: Authenticator,
        metrics: Metrics,
        unready: Callable[[], str],
    ) -> None:
        self._address = address
        self._tls = tls
        self._authenticator = authenticator
        self._metrics = metrics
        self._unready = unready
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def __aenter__(self) -> "HttpGateway":
        app = web.Application()
        app.router.add_get("/", self._root)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics_text)
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

    async def _metrics_text(self, request: web.Request) -> web.Response:
        try:
            self._authenticator.authenticate(_HttpCredentials(request))
        except Unauthenticated as exc:
            return web.Response(status=401, text=f"{exc.message}\n", headers={"WWW-Authenticate": "Bearer"})
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
