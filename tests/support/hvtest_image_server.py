"""A server of image content that misbehaves on demand, and a node's cache that fetches from it."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from hvtest_images import sha256_of
from hypervisor.agent.images.cache import ImageCache
from hypervisor.core.blobs import BlobDirectory
from hypervisor.core.clock import SystemClock
from hypervisor.core.images import ImageKind, ImageSource
from hypervisor.core.retry import Backoff
from hypervisor.wire.image_http import BLOB_PATH, BlobFetcher, FetchSettings, TokenRule, fetch_session

__all__ = ["ContentServer", "running_cache", "source_of"]


class ContentServer:
    """Serves ``contents`` by their digests, with ranges. Enter it with ``async with``.

    ``ranges``   the Range headers it got, in order, and ``tokens`` the Authorization headers
    ``gate``     answers wait for it
    ``lies``     content to send in place of the right one, by digest
    ``answer``   if set, makes the answer to everything
    """

    def __init__(self, *contents: bytes) -> None:
        self.contents = {sha256_of(data): data for data in contents}
        self.lies: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.tokens: list[str | None] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()
        self.answer: Callable[[], web.Response] | None = None
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get(BLOB_PATH + "{digest}", self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _get(self, request: web.Request) -> web.Response:
        self.ranges.append(request.headers.get("Range", ""))
        self.tokens.append(request.headers.get("Authorization"))
        self.arrived.set()
        await self.gate.wait()
        if self.answer is not None:
            return self.answer()
        digest = request.match_info["digest"]
        data = self.lies.get(digest, self.contents.get(digest))
        if data is None:
            return web.Response(status=404)
        begin = request.http_range.start or 0
        if begin >= len(data):
            return web.Response(status=416)
        headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        return web.Response(status=206, body=data[begin:], headers=headers)


def source_of(
    data: bytes, *servers: str, name: str = "debian-12", kind: ImageKind = ImageKind.DISK
) -> ImageSource:
    """What a node is told of an image with this content."""
    return ImageSource(
        name=name, kind=kind, format="raw", size_bytes=len(data), sha256=sha256_of(data), servers=servers
    )


async def _nothing() -> None:
    return


@asynccontextmanager
async def running_cache(
    root: Path,
    *,
    limit_bytes: int = 0,
    known: Sequence[str] = (),
    token_for: TokenRule = lambda _: "",
    attempts: int = 4,
    collect: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[ImageCache]:
    """A cache that runs inside the context."""
    blobs = BlobDirectory(root)
    async with fetch_session() as session:
        fetcher = BlobFetcher(
            blobs,
            session,
            clock=SystemClock(),
            rng=random.Random(1),
            token_for=token_for,
            settings=FetchSettings(
                connect_timeout_s=1.0,
                read_timeout_s=1.0,
                attempts=attempts,
                backoff=Backoff(initial_s=0.01, maximum_s=0.02),
            ),
        )
        cache = ImageCache(
            blobs,
            fetcher,
            limit_bytes=limit_bytes,
            clock=SystemClock(),
            known=lambda: frozenset(known) if known else None,
            collect=collect or _nothing,
        )
        running = asyncio.create_task(cache.run())
        try:
            yield cache
            if running.done():
                running.result()
        finally:
            running.cancel()
            await asyncio.wait({running})
