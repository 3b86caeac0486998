"""Where the agent serves ``/metrics``: a small HTTP server of its own, on loopback unless configured otherwise."""

import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

from hypervisor.agent.metrics.text import CONTENT_TYPE
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.settings import split_address

__all__ = ["MetricsServer"]


class MetricsServer:
    """Enter it with ``async with`` to listen. FailedPrecondition (``ADDRESS_IN_USE``) when that is not possible."""

    def __init__(
        self, address: str, *, tls: ssl.SSLContext | None, text: Callable[[], Awaitable[bytes]]
    ) -> None:
        self._address = address
        self._tls = tls
        self._text = text
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def __aenter__(self) -> "MetricsServer":
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        host, port = split_address(self._address)
        try:
            await web.TCPSite(runner, host, port, ssl_context=self._tls).start()
        except OSError as exc:
            await runner.cleanup()
            raise FailedPrecondition(
                f"metrics.address {self._address} cannot be listened on: {exc.strerror or exc}",
                reason="ADDRESS_IN_USE",
                metadata={"address": self._address},
            ) from exc
        self._runner = runner
        self.port = int(runner.addresses[0][1])
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=await self._text(), headers={"Content-Type": CONTENT_TYPE})
