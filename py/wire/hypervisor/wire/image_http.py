"""Fetching content from servers over HTTP: by ranges, so that what a cut left is taken up, and verified at the end.

One request at a time for one content; servers are asked in turn. What arrives is never unpacked: a server that sends
it with a content coding is refused. Redirects are not followed.
"""

import asyncio
import itertools
import random
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import structlog

from hypervisor.core.blobs import BlobDirectory, PartialFile
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, NotFound, Unavailable
from hypervisor.core.images import ImageSource
from hypervisor.core.retry import Backoff
from hypervisor.core.uninterrupted import uninterrupted

__all__ = [
    "BLOB_PATH",
    "BlobFetcher",
    "FetchSettings",
    "TokenRule",
    "fetch_session",
    "tokens_for_known_hosts",
]

BLOB_PATH = "/images/sha256/"
"""Where servers offer content, by its digest."""
_CHUNK = 1 << 18

TokenRule = Callable[[str], str]
"""Takes the address of a server, returns the bearer token to show there; empty for none."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """How patient a fetch is. ``attempts``: failures in a row, without a byte between them, that end it."""

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    attempts: int = 8
    backoff: Backoff = field(default_factory=lambda: Backoff(initial_s=0.1, maximum_s=3.0))


class _NextServer(Exception):
    """This server will not do; the message says why. ``absent``: it does not have the content."""

    def __init__(self, why: str, *, absent: bool = False) -> None:
        super().__init__(why)
        self.absent = absent


class _Tries:
    """What has gone wrong in one fetch so far, and when it is enough."""

    def __init__(self, source: ImageSource, *, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._in_a_row = 0
        self._absent: set[str] = set()
        self._corrupt = 0
        self._about = {"image": source.name, "sha256": source.sha256}

    def corrupt(self, server: str, digest: str) -> None:
        """The whole content is here and is not it."""
        self._corrupt += 1
        if self._corrupt > len(self._source.servers):
            raise FailedPrecondition(
                f"image {self._source.name} cannot be fetched: {server} sent content with the digest {digest}, and it "
                f"has to be {self._source.sha256}; import it again",
                reason="IMAGE_CORRUPT",
                metadata=self._about,
            )

    def failed(self, server: str, why: str, *, absent: bool, progress: bool, received: int) -> None:
        """A request did not bring all that was missing."""
        self._in_a_row = 1 if progress else self._in_a_row + 1
        if absent:
            self._absent.add(server)
        if self._absent >= set(self._source.servers):
            raise NotFound(
                f"image {self._source.name} ({self._source.sha256}) is at none of the servers that should have it: it "
                "was deleted, or their disk lost it; import it again",
                reason="IMAGE_NOT_FOUND",
                metadata=self._about,
            )
        if self._in_a_row >= self._limit:
            raise Unavailable(
                f"image {self._source.name} cannot be fetched: {why} ({received} of {self._source.size_bytes} bytes "
                "are here; another try goes on from there)",
                reason="IMAGE_FETCH_FAILED",
                metadata=self._about,
                retry_after_s=1.0,
            )


class BlobFetcher:
    """Fetches into a :class:`BlobDirectory`. ``session`` (see :func:`fetch_session`) belongs to its maker."""

    def __init__(
        self,
        blobs: BlobDirectory,
        session: aiohttp.ClientSession,
        *,
        clock: Clock,
        rng: random.Random,
        token_for: TokenRule = lambda _: "",
        settings: FetchSettings | None = None,
    ) -> None:
        self._blobs = blobs
        self._session = session
        self._clock = clock
        self._rng = rng
        self._token_for = token_for
        self._settings = settings or FetchSettings()

    async def fetch(self, source: ImageSource) -> None:
        """Bring the content of ``source`` into the directory, whole and verified, or raise and keep what came.

        NotFound (``IMAGE_NOT_FOUND``): no server has it. Unavailable (``IMAGE_FETCH_FAILED``): none can be reached, or
        they keep breaking off. FailedPrecondition (``IMAGE_CORRUPT``): what they send is not it. ResourceExhausted
        (``DISK_FULL``). One fetch of a content at a time.
        """
        if not source.servers:
            raise Unavailable(
                f"no server that is alive has the content of image {source.name}: start one that has it, or import "
                "the image again",
                reason="IMAGE_FETCH_FAILED",
                metadata={"image": source.name, "sha256": source.sha256},
            )
        path = self._blobs.partial / source.sha256
        part = PartialFile(path, most_bytes=source.size_bytes)
        try:
            await uninterrupted(asyncio.to_thread(part.take_up))
            await self._receive(source, part)
            await uninterrupted(asyncio.to_thread(self._blobs.publish, part))
        finally:
            part.close()

    async def _receive(self, source: ImageSource, part: PartialFile) -> None:
        if part.received:
            _log.info("image_fetch_resumed", image=source.name, received=part.received)
        tries = _Tries(source, limit=self._settings.attempts)
        delays = self._settings.backoff.delays(self._rng)
        for turn in itertools.count():
            server = source.servers[turn % len(source.servers)]
            before, absent = part.received, False
            try:
                if part.received < source.size_bytes:
                    await self._ask(server, source, part)
                why = f"{server} ended too early"
            except _NextServer as exc:
                why, absent = str(exc), exc.absent
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
                why = f"{server}: {type(exc).__name__} {exc}".rstrip()
            if part.received == source.size_bytes:
                if part.sha256 == source.sha256:
                    return
                _log.warning("image_corrupt", image=source.name, server=server, digest=part.sha256)
                tries.corrupt(server, part.sha256)
                await uninterrupted(asyncio.to_thread(part.restart))
                continue
            progress = part.received > before
            if progress:
                delays = self._settings.backoff.delays(self._rng)
            tries.failed(server, why, absent=absent, progress=progress, received=part.received)
            _log.info("image_fetch_broken", image=source.name, error=why, received=part.received)
            if progress or (turn + 1) % len(source.servers) == 0:
                await self._clock.sleep(next(delays))

    async def _ask(self, server: str, source: ImageSource, part: PartialFile) -> None:
        """One request for what is missing, appended to ``part`` as far as it comes."""
        _check_server(server)
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={part.received}-"}
        token = self._token_for(server)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        timeout = aiohttp.ClientTimeout(
            total=None,
            connect=self._settings.connect_timeout_s,
            sock_connect=self._settings.connect_timeout_s,
            sock_read=self._settings.read_timeout_s,
        )
        url = f"{server.rstrip('/')}{BLOB_PATH}{source.sha256}"
        async with self._session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as answer:
            _check_answer(server, answer, source, part.received)
            async for data in answer.content.iter_chunked(_CHUNK):
                if part.received + len(data) > source.size_bytes:
                    raise _NextServer(f"{server} sends more than {source.size_bytes} bytes")
                await uninterrupted(asyncio.to_thread(part.append, data))


def fetch_session(ssl_context: ssl.SSLContext | None = None) -> aiohttp.ClientSession:
    """A session for fetches: no cookies, no proxies, nothing unpacked. Close it."""
    connector = aiohttp.TCPConnector(limit=32, ssl=True if ssl_context is None else ssl_context)
    return aiohttp.ClientSession(
        connector=connector, auto_decompress=False, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
    )


def _check_server(server: str) -> None:
    """Refuse what is no plain HTTP address of a server."""
    parts = urlsplit(server)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise _NextServer(f"{server!r} is not the HTTP address of a server")


def tokens_for_known_hosts(token: str, hosts: Sequence[str]) -> TokenRule:
    """Show the token over TLS, and over plain HTTP to hosts that are configured, never to any other address."""
    known = {host.lower() for host in hosts}

    def rule(server: str) -> str:
        parts = urlsplit(server)
        trusted = parts.scheme == "https" or (parts.hostname or "").lower() in known
        return token if trusted else ""

    return rule


def _check_answer(server: str, answer: aiohttp.ClientResponse, source: ImageSource, received: int) -> None:
    if answer.status in (404, 410):
        raise _NextServer(f"{server} does not have it", absent=True)
    if answer.status in (401, 403):
        raise _NextServer(
            f"{server} does not know this agent ({answer.status}): check agent.token, or its certificate"
        )
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _NextServer(f"{server} sends it compressed")
    if answer.status == 206:
        expected = f"bytes {received}-{source.size_bytes - 1}/{source.size_bytes}"
        if answer.headers.get("Content-Range") != expected:
            raise _NextServer(
                f"{server} sends {answer.headers.get('Content-Range')!r} and not {expected!r}: its content has "
                "another size"
            )
    elif answer.status != 200 or received:
        raise _NextServer(f"{server} answers {answer.status}")
