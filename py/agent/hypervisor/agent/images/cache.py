"""The node's cache of images: content by digest, and a hard link to it for each instance that uses it.

::

    DIR/sha256/ab/ab12...                 whole, verified content
    DIR/partial/{digest}                  being fetched, or to be gone on with
    DIR/instances/{instance id}/{digest}  the same file as in sha256/, for one instance

An instance is given the path of its own link. So the file system itself counts who uses what: content with a second
link is in use, and even if its first name were taken away the instance would keep the file. When room is needed,
content without a second link goes, that used longest ago first (the file's access time, set at each use).
"""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from hypervisor.agent.drivers.driver import LocalImage
from hypervisor.core.blobs import BlobDirectory, disk_errors, sync_directory
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Internal, ResourceExhausted, Unavailable
from hypervisor.core.ids import is_id
from hypervisor.core.images import ImageSource
from hypervisor.core.uninterrupted import uninterrupted

__all__ = ["Fetcher", "ImageCache"]

_AT_ONCE = 4
_PARTIAL_KEPT_S = 86_400.0
_TIDY_EVERY_S = 300.0

_log = structlog.get_logger(__name__)


class Fetcher(Protocol):
    """Brings content into the cache's directory; ``wire.image_http.BlobFetcher``."""

    async def fetch(self, source: ImageSource) -> None: ...


@dataclass(slots=True, eq=False)
class _Fetch:
    """One content being fetched, for any number of instances."""

    outcome: asyncio.Future[None]
    task: asyncio.Task[None] | None = None
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    digest: str
    size_bytes: int
    used_at: float
    in_use: bool


class ImageCache:
    """See the module's docstring; implements ``ImageProvider``. ``run`` must be running.

    ``limit_bytes``: of all content here, in use or not; 0: the disk decides. ``known``: ids of the node's instances, or
    None while that is not certain. ``collect``: has drivers take away what they made of images for instances.
    """

    def __init__(
        self,
        blobs: BlobDirectory,
        fetcher: Fetcher,
        *,
        limit_bytes: int,
        clock: Clock,
        known: Callable[[], frozenset[str] | None],
        collect: Callable[[], Awaitable[None]],
    ) -> None:
        self._blobs = blobs
        self._fetcher = fetcher
        self._limit = limit_bytes
        self._clock = clock
        self._known = known
        self._collect = collect
        self._links = blobs.root / "instances"
        self._group: asyncio.TaskGroup | None = None
        self._running = asyncio.Event()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._fetches: dict[str, _Fetch] = {}
        self._arriving: dict[str, int] = {}
        self._wanted: Counter[str] = Counter()
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._room = asyncio.Lock()
        self._linking = asyncio.Lock()
        self._digests: frozenset[str] = frozenset()

    @property
    def digests(self) -> frozenset[str]:
        """What is here, as of the last look."""
        return self._digests

    async def run(self) -> None:
        """Serve until cancelled; now and then tidy up what crashes left."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._running.set()
            try:
                while True:
                    await self.tidy()
                    await self._collect()
                    await self._clock.sleep(_TIDY_EVERY_S)
            finally:
                self._running.clear()
                self._group = None

    # --- ImageProvider

    async def obtain(self, instance_id: str, sources: Sequence[ImageSource]) -> dict[str, LocalImage]:
        if not sources:
            return {}
        if not is_id(instance_id, "i"):
            raise Internal(f"{instance_id!r} is not the id of an instance")
        found: dict[str, LocalImage] = {}
        with self._wanting({source.sha256 for source in sources}):
            for source in sources:
                await self._ensure(source)
                async with self._linking:
                    path = await uninterrupted(asyncio.to_thread(self._link, instance_id, source))
                found[source.name] = LocalImage(
                    path=str(path),
                    kind=source.kind,
                    format=source.format,
                    size_bytes=source.size_bytes,
                    sha256=source.sha256,
                )
        return found

    async def release(self, instance_id: str, *, digests: Sequence[str] | None = None) -> None:
        if not is_id(instance_id, "i"):
            return
        try:
            await uninterrupted(asyncio.to_thread(self._unlink, instance_id, digests))
        except (HypervisorError, OSError) as exc:
            # The instance is gone all the same; `tidy` takes the links away later.
            _log.warning("image_not_released", instance=instance_id, error=str(exc))

    # --- fetching

    async def _ensure(self, source: ImageSource) -> None:
        """The content is here when this returns; any number of callers fetch it once."""
        digest = source.sha256
        if await asyncio.to_thread(self._use, source):
            return
        fetch = self._fetches.get(digest)
        if fetch is None:
            await self._running.wait()
            if self._group is None:
                raise Unavailable("the agent is stopping", reason="AGENT_NOT_READY", retry_after_s=1.0)
            fetch = self._fetches.get(digest)
        if fetch is None:
            assert self._group is not None
            fetch = self._fetches[digest] = _Fetch(asyncio.get_running_loop().create_future())
            fetch.task = self._group.create_task(self._fetch(source, fetch), name=f"fetch-{digest[:12]}")
        fetch.waiting += 1
        try:
            await asyncio.shield(fetch.outcome)
        except HypervisorError as exc:
            # Several callers raise it, each with a traceback of its own.
            raise _copy(exc) from exc
        finally:
            fetch.waiting -= 1
            if not fetch.waiting and not fetch.outcome.done() and fetch.task is not None:
                self._let_go(digest, fetch.task)

    def _let_go(self, digest: str, task: asyncio.Task[None]) -> None:
        """Nobody waits for it any more. The next fetch of it begins when this one has let go of the file."""
        del self._fetches[digest]
        self._ending[digest] = task
        task.add_done_callback(lambda _: self._ending.pop(digest, None))
        task.cancel()

    async def _fetch(self, source: ImageSource, fetch: _Fetch) -> None:
        digest, began = source.sha256, self._clock.monotonic()
        try:
            if digest in self._ending:
                await asyncio.wait({self._ending[digest]})
            async with self._slots:
                await self._make_room(source)
                try:
                    await self._fetch_once(source)
                finally:
                    self._arriving.pop(digest, None)
        except HypervisorError as exc:
            fetch.outcome.set_exception(exc)
            fetch.outcome.exception()
        except asyncio.CancelledError:
            fetch.outcome.cancel()
            raise
        except Exception as exc:
            _log.exception("image_fetch_defect", image=source.name)
            fetch.outcome.set_exception(Internal(f"image {source.name}: {exc}"))
            fetch.outcome.exception()
        else:
            fetch.outcome.set_result(None)
            _log.info(
                "image_fetched",
                image=source.name,
                size_bytes=source.size_bytes,
                seconds=round(self._clock.monotonic() - began, 3),
            )
        finally:
            if self._fetches.get(digest) is fetch:
                del self._fetches[digest]

    async def _fetch_once(self, source: ImageSource) -> None:
        if await asyncio.to_thread(self._use, source):
            return
        while True:
            try:
                await self._fetcher.fetch(source)
            except ResourceExhausted:
                # The disk is fuller than our own limit knows: what nobody uses goes, one after another, before an
                # instance is refused.
                async with self._room:
                    freed = await asyncio.to_thread(self._evict, 1)
                if not freed:
                    # What came would only keep the disk full.
                    await asyncio.to_thread((self._blobs.partial / source.sha256).unlink, missing_ok=True)
                    raise
            else:
                self._digests |= {source.sha256}
                return

    async def _make_room(self, source: ImageSource) -> None:
        """Collect until the content fits under the limit. ResourceExhausted (``IMAGE_CACHE_FULL``)."""
        async with self._room:
            if self._limit:
                kept = await asyncio.to_thread(self._survey)
                used = sum(one.size_bytes for one in kept) + sum(self._arriving.values())
                used += self._partial_bytes(but=source.sha256)
                excess = used + source.size_bytes - self._limit
                freed = await asyncio.to_thread(self._evict, excess) if excess > 0 else 0
                if freed < excess:
                    raise ResourceExhausted(
                        f"image {source.name} ({source.size_bytes} bytes) does not fit into this node's cache: "
                        f"{used - freed} of {self._limit} bytes are in use by instances or being fetched; raise "
                        "images.cache_bytes, or delete instances",
                        reason="IMAGE_CACHE_FULL",
                        metadata={"image": source.name, "limit": str(self._limit), "used": str(used - freed)},
                    )
            self._arriving[source.sha256] = source.size_bytes

    @contextmanager
    def _wanting(self, digests: set[str]) -> Iterator[None]:
        """These are not collected inside, although no instance has a link yet."""
        self._wanted.update(digests)
        try:
            yield
        finally:
            self._wanted.subtract(digests)
            self._wanted += Counter()

    # --- files (these block)

    def _use(self, source: ImageSource) -> bool:
        """Whether the content is here, marked as used now. One of another size was damaged, and goes."""
        path = self._blobs.find(source.sha256)
        if path is None:
            return False
        with disk_errors(path):
            status = path.stat()
            if status.st_size != source.size_bytes:
                _log.warning("image_damaged", image=source.name, size_bytes=status.st_size)
                path.unlink()
                return False
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return True

    def _link(self, instance_id: str, source: ImageSource) -> Path:
        path = self._links / instance_id / source.sha256
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            blob = self._blobs.path(source.sha256)
            if path.exists() and not path.samefile(blob):
                path.unlink()
            with contextlib.suppress(FileExistsError):
                os.link(blob, path)
            sync_directory(path.parent)
        return path

    def _unlink(self, instance_id: str, digests: Sequence[str] | None) -> None:
        directory = self._links / instance_id
        with disk_errors(directory), contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(directory)):
                if digests is None or entry.name in digests:
                    Path(entry.path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                # It stays while it is not empty.
                directory.rmdir()

    def _survey(self) -> list[_Kept]:
        kept = []
        for entry in self._blobs.entries():
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                kept.append(_Kept(entry.name, status.st_size, status.st_atime, status.st_nlink > 1))
        self._digests = frozenset(one.digest for one in kept)
        return kept

    def _evict(self, wanted_bytes: int) -> int:
        """Take away what nobody uses, longest unused first, until so much is free; returns how much that was."""
        idle = [one for one in self._survey() if not one.in_use and one.digest not in self._wanted]
        if sum(one.size_bytes for one in idle) + self._partial_bytes() < wanted_bytes:
            return 0
        freed = self._drop_partials(older_than_s=0.0)
        for one in sorted(idle, key=lambda one: one.used_at):
            if freed >= wanted_bytes:
                break
            if self._blobs.remove(one.digest):
                freed += one.size_bytes
                self._digests -= {one.digest}
                _log.info("image_collected", sha256=one.digest, size_bytes=one.size_bytes)
        return freed

    def _idle_partials(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What came of fetches that nobody goes on with now."""
        for path in self._blobs.partials():
            if path.name not in self._arriving and path.name not in self._wanted:
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()

    def _partial_bytes(self, *, but: str = "") -> int:
        return sum(status.st_size for path, status in self._idle_partials() if path.name != but)

    def _drop_partials(self, *, older_than_s: float) -> int:
        freed = 0
        for path, status in self._idle_partials():
            if time.time() - status.st_mtime >= older_than_s:
                path.unlink(missing_ok=True)
                freed += status.st_size
        return freed

    async def tidy(self) -> None:
        """Take away links of instances that are not here any more, and old remains of fetches."""
        try:
            there = await asyncio.to_thread(self._look_around)
            async with self._linking:
                # Asked after the look: an instance has its entry before it has links.
                known = self._known()
                left = () if known is None else sorted(there - known)
                for instance_id in left:
                    _log.info("image_links_left", instance=instance_id)
                    await uninterrupted(asyncio.to_thread(self._unlink, instance_id, None))
        except (HypervisorError, OSError) as exc:
            _log.warning("images_not_tidied", error=str(exc))

    def _look_around(self) -> set[str]:
        """Ids of the instances that have links; drops old remains of fetches on the way."""
        self._survey()
        self._drop_partials(older_than_s=_PARTIAL_KEPT_S)
        try:
            return {entry.name for entry in os.scandir(self._links) if is_id(entry.name, "i")}
        except FileNotFoundError:
            return set()


def _copy(error: HypervisorError) -> HypervisorError:
    return type(error)(
        error.message,
        reason=error.reason,
        metadata=error.metadata,
        violations=error.violations,
        retry_after_s=error.retry_after_s,
    )
