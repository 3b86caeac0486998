"""Keeps one server's store of images in step with the records: who holds what, what is missing, what is left over.

- Content that a record names and that is here: this store is entered as a holder. Content that is gone: taken out.
- Content that other servers have and this one does not is fetched, so that an image outlives each single server.
- Content that no record names goes: at once when the last such image was deleted, else after a grace.
"""

import asyncio
import time
from collections.abc import Iterable

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError
from hypervisor.core.images import Image, ImageSource, ImageState
from hypervisor.server import keys
from hypervisor.server.cluster_state import Update
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.drafts import Draft
from hypervisor.server.images.naming import servers_of, with_holder
from hypervisor.server.images.store import ImageStore
from hypervisor.server.images.uploads import Uploads
from hypervisor.server.view import StoreView
from hypervisor.wire.image_http import BlobFetcher

__all__ = ["ImageKeeper"]

_LOOK_EVERY_S = 60.0
_RETRY_S = 5.0
_FETCH_AGAIN_S = 15.0
_ORPHAN_GRACE_S = 3600.0
_IMAGES = keys.image("").path

_log = structlog.get_logger(__name__)


class ImageKeeper:
    """``run`` does the work, woken by changes of images and now and then. ``fetcher`` None: nothing is fetched."""

    def __init__(
        self,
        store: ImageStore,
        uploads: Uploads,
        view: StoreView,
        committer: GroupCommitter,
        clock: Clock,
        *,
        upload_retention_s: float,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._view = view
        self._committer = committer
        self._clock = clock
        self._retention_s = upload_retention_s
        self._wake = asyncio.Event()
        self._fetching: set[str] = set()
        self._digests: dict[str, str] = {}
        self._released: set[str] = set()
        self.fetcher: BlobFetcher | None = None
        view.add_record_listener(self._changed)

    def _changed(self, updates: tuple[Update, ...]) -> None:
        for update in updates:
            if not update.path.startswith(_IMAGES):
                continue
            if update.record is not None:
                self._digests[update.path] = update.record.value.sha256
            elif update.deleted:
                self._released.add(self._digests.pop(update.path, ""))
            self._wake.set()

    async def run(self) -> None:
        """Keep them in step until cancelled."""
        await self._view.loaded()
        while True:
            self._wake.clear()
            wait_s = _LOOK_EVERY_S
            if self._store.exists or self._missing():
                try:
                    await self._store.open()
                    await self._look()
                    if not await self._fetch_missing():
                        wait_s = _FETCH_AGAIN_S
                except HypervisorError as exc:
                    _log.warning("images_not_kept", reason=exc.reason, error=str(exc))
                    wait_s = _RETRY_S
            await self._pause(wait_s)

    async def _pause(self, seconds: float) -> None:
        sleeper = asyncio.ensure_future(self._clock.sleep(seconds))
        waker = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({sleeper, waker}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeper.cancel()
            waker.cancel()
            await asyncio.gather(sleeper, waker, return_exceptions=True)

    async def _look(self) -> None:
        present = await asyncio.to_thread(self._store.present)
        for found in list(self._view.images()):
            holds = found.value.sha256 in present
            if holds is not (self._store.id in found.value.holders):
                await self._committer.commit(
                    lambda d, image=found.value, holds=holds: self._enter(d, image, holds=holds)
                )
                _log.info("image_holder_changed", image=found.value.name, holds=holds)
        left = {digest for digest, since in present.items() if self._is_left(digest, since)}
        released = self._released & present.keys()
        self._released.clear()
        await self.drop_unnamed(left | released)
        busy = self._uploads.busy | self._fetching
        await asyncio.to_thread(
            self._store.discard_old_partials, older_than_s=self._retention_s, busy=frozenset(busy)
        )

    def _enter(self, draft: Draft, image: Image, *, holds: bool) -> None:
        record = draft.get(keys.image(image.id))
        if record is None:
            return
        # What is said is what the disk shows when it is decided, not what it showed some time ago.
        holds = self._store.find(image.sha256) is not None
        changed = with_holder(record.value, self._store.id, holds=holds)
        if changed != record.value:
            draft.put(keys.image(image.id), changed)

    def _is_left(self, digest: str, since: float) -> bool:
        """Whether nobody names it, for long enough that no import can be about to."""
        return time.time() - since > _ORPHAN_GRACE_S and not self._named(digest)

    def _named(self, digest: str) -> bool:
        return any(found.value.sha256 == digest for found in self._view.images())

    async def drop_unnamed(self, digests: Iterable[str]) -> None:
        """Remove content that no image has (any more)."""
        for digest in digests:
            kept = self._store.held(digest) or self._named(digest)
            if not kept and await asyncio.to_thread(self._store.blobs.remove, digest):
                _log.info("image_content_removed", sha256=digest)

    def _missing(self) -> list[Image]:
        """Images of others that are to be fetched."""
        if self.fetcher is None:
            return []
        return [
            found.value
            for found in self._view.images()
            if found.value.state is ImageState.READY
            and self._store.id not in found.value.holders
            and servers_of(self._view, found.value)
        ]

    async def _fetch_missing(self) -> bool:
        """Fetch what others have, one after another; False where one could not be."""
        complete = True
        for image in self._missing():
            if self.fetcher is None or self._store.find(image.sha256) is not None:
                continue
            source = ImageSource(
                name=image.name,
                kind=image.kind,
                format=image.format,
                size_bytes=image.size_bytes,
                sha256=image.sha256,
                servers=servers_of(self._view, image),
            )
            self._fetching.add(image.sha256)
            try:
                self._store.check_room(image.size_bytes)
                with self._store.hold(image.sha256):
                    await self.fetcher.fetch(source)
                    await self._committer.commit(lambda d, image=image: self._enter(d, image, holds=True))
                _log.info("image_replicated", image=image.name, size_bytes=image.size_bytes)
            except HypervisorError as exc:
                # The others are not to wait for it. NotFound: deleted meanwhile, most likely.
                _log.warning("image_not_replicated", image=image.name, reason=exc.reason, error=exc.message)
                complete = False
            finally:
                self._fetching.discard(image.sha256)
        return complete
