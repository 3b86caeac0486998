"""Images: what the calls of ImageService do. Implements ``Images``; see there and image.proto for the rules."""

from collections.abc import AsyncIterator, Iterable

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
)
from hypervisor.core.ids import IdSource
from hypervisor.core.images import Image, ImageState
from hypervisor.core.model import OperationRecord
from hypervisor.server import keys
from hypervisor.server.committer import Decided, GroupCommitter
from hypervisor.server.drafts import Draft
from hypervisor.server.images.contract import (
    OBJECT_KIND,
    Chunk,
    ImageRef,
    ImportHeader,
    UploadProgress,
)
from hypervisor.server.images.deleting import finish_delete, mark_deleting, users_of
from hypervisor.server.images.keeping import ImageKeeper
from hypervisor.server.images.naming import image_not_found, servers_of, with_holder
from hypervisor.server.images.store import ImageStore
from hypervisor.server.images.uploads import Received, Uploads
from hypervisor.server.instances import check_project
from hypervisor.server.operations import OperationService
from hypervisor.server.records import ImageClaim
from hypervisor.server.services import Caller, Mutation, Versioned
from hypervisor.server.verbs import check_version
from hypervisor.server.view import StoreView

__all__ = ["ImageService"]

IMAGE_ID_PREFIX = "img"
_USERS_SHOWN = 10

log = structlog.get_logger(__name__)


class ImageService:
    """See ``Images`` for the contract."""

    def __init__(
        self,
        store: ImageStore,
        uploads: Uploads,
        keeper: ImageKeeper,
        view: StoreView,
        committer: GroupCommitter,
        operations: OperationService,
        clock: Clock,
        *,
        new_id: IdSource,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._keeper = keeper
        self._view = view
        self._committer = committer
        self._operations = operations
        self._clock = clock
        self._new_id = new_id

    # --- import

    async def upload(
        self, header: ImportHeader, chunks: AsyncIterator[Chunk], caller: Caller
    ) -> Versioned[Image]:
        check_project(header.project)
        if header.size_bytes > self._store.max_bytes:
            raise ResourceExhausted(
                f"the image has {header.size_bytes} bytes: this server takes {self._store.max_bytes} at most "
                "(image_store.max_bytes)",
                reason="IMAGE_TOO_LARGE",
                metadata={"size_bytes": str(header.size_bytes), "limit": str(self._store.max_bytes)},
            )
        known = self._named(header)
        if known is not None:
            return known
        digest = ""
        try:
            async with self._uploads.receive(header, chunks, caller.principal) as received:
                digest = received.sha256
                image = await self._record(header, received, caller)
        except AlreadyExists:
            # Somebody else was given the name meanwhile; what came is of no use, unless another image has the same.
            if digest:
                await self._keeper.drop_unnamed((digest,))
            raise
        log.info(
            "image_imported",
            image=image.value.name,
            kind=image.value.kind.value,
            format=image.value.format,
            size_bytes=image.value.size_bytes,
            principal=caller.principal,
        )
        return image

    async def _record(self, header: ImportHeader, received: Received, caller: Caller) -> Versioned[Image]:
        image_id = self._new_id(IMAGE_ID_PREFIX)
        opened = self._operations.open(
            "import",
            Mutation(caller, "", ""),
            object_kind=OBJECT_KIND,
            object_id=image_id,
            object_name=header.name,
            project=header.project,
        )

        def decide(draft: Draft) -> Image:
            claim = draft.get(keys.image_name(header.project, header.name))
            if claim is not None:
                return self._join(draft, header, received, claim.value.image_id)
            image = Image(
                id=image_id,
                name=header.name,
                project=header.project,
                kind=received.content.kind,
                format=received.content.format,
                size_bytes=received.size_bytes,
                sha256=received.sha256,
                created_at=draft.now,
                created_by=caller.principal,
                virtual_size_bytes=received.content.virtual_size_bytes,
                holders=(self._store.id,),
            )
            draft.put(keys.image_name(header.project, header.name), ImageClaim(image_id=image_id))
            draft.create(keys.image(image_id), image)
            self._operations.record_done(draft, opened)
            return image

        decided = await self._committer.commit(decide)
        # The keeper takes content that no image of the view has for a leftover.
        await self._view.wait_revision(decided.revision)
        return self._committer.find(keys.image(decided.value.id)) or Versioned(
            decided.value, decided.revision
        )

    def _join(self, draft: Draft, header: ImportHeader, received: Received, image_id: str) -> Image:
        """The name is taken: by the same image, which this store now holds as well, or by another."""
        found = draft.get(keys.image(image_id))
        if found is None:
            raise Internal(f"the name {header.name} belongs to image {image_id}, which does not exist")
        image = found.value
        if image.sha256 != received.sha256 or image.kind is not received.content.kind:
            raise _name_taken(header)
        if image.state is not ImageState.READY:
            raise _being_deleted(image)
        joined = with_holder(image, self._store.id, holds=True)
        if self._store.id not in image.holders:
            draft.put(keys.image(image_id), joined)
            return joined
        return image

    def _named(self, header: ImportHeader) -> Versioned[Image] | None:
        """The image that has the name, if it is the one to be imported; refused, before anything is sent, if not."""
        claim = self._committer.find(keys.image_name(header.project, header.name))
        found = None if claim is None else self._committer.find(keys.image(claim.value.image_id))
        if found is None:
            return None
        image = found.value
        same = image.size_bytes == header.size_bytes and header.kind in (None, image.kind)
        if not same or (header.sha256 and header.sha256 != image.sha256):
            raise _name_taken(header)
        if header.sha256 and image.state is ImageState.READY and self._store.id in image.holders:
            return found
        # Without a digest only the content tells; and a store that has lost it gets it again.
        return None

    async def progress(self, upload_id: str, caller: Caller) -> UploadProgress:
        return await self._uploads.progress(caller.principal, upload_id)

    # --- reading

    def resolve(self, ref: ImageRef) -> Versioned[Image]:
        found = self._committer.find(keys.image(self._id_of(ref)))
        if found is None or found.value.project != ref.project:
            raise image_not_found(ref.image)
        check_version(found, ref.resource_version, what=f"image {found.value.name}")
        return found

    def all(self) -> Iterable[Versioned[Image]]:
        return self._view.images()

    def servers_of(self, image: Image) -> tuple[str, ...]:
        return servers_of(self._view, image)

    def _id_of(self, ref: ImageRef) -> str:
        claim = self._committer.find(keys.image_name(ref.project, ref.image))
        return ref.image if claim is None else claim.value.image_id

    # --- delete

    async def delete(self, ref: ImageRef, mutation: Mutation, *, force: bool) -> Versioned[OperationRecord]:
        opened = self._operations.open("delete", mutation, object_kind=OBJECT_KIND, project=ref.project)

        def mark(draft: Draft) -> OperationRecord | Image:
            known = self._operations.repeated(draft, opened)
            if known is not None:
                return known
            image = self._found(draft, ref)
            if not force:
                self._check_unused(image)
            return mark_deleting(draft, image, opened, force=force)

        marked = await self._committer.commit(mark)
        if isinstance(marked.value, OperationRecord):
            return await self._operations.conclude(Decided(marked.value, marked.revision), wait=mutation.wait)
        image = marked.value
        await self._view.wait_revision(marked.revision)

        def finish(draft: Draft) -> OperationRecord | None:
            found = draft.get(keys.image(image.id))
            if found is None:
                return self._deleted_by_the_leader(draft, opened, ref)
            if found.value.state is not ImageState.DELETING:
                return None
            if not finish_delete(
                draft, found.value, image.deletion, used=bool(users_of(self._view, image.id))
            ):
                return None
            done = draft.get(keys.operation(opened.id))
            assert done is not None
            return done.value

        finished = await self._committer.commit(finish)
        if finished.value is None:
            self._check_unused(image)
            raise _being_deleted(image)
        log.info("image_deleted", image=image.name, image_id=image.id, principal=opened.principal)
        return await self._operations.conclude(Decided(finished.value, finished.revision), wait=mutation.wait)

    @staticmethod
    def _deleted_by_the_leader(draft: Draft, opened: OperationRecord, ref: ImageRef) -> OperationRecord:
        """The operation where the leader found that this server took too long; else another delete was faster."""
        done = draft.get(keys.operation(opened.id))
        if done is None:
            raise image_not_found(ref.image)
        return done.value

    def _found(self, draft: Draft, ref: ImageRef) -> Image:
        claim = draft.get(keys.image_name(ref.project, ref.image))
        found = draft.get(keys.image(ref.image if claim is None else claim.value.image_id))
        if found is None or found.value.project != ref.project:
            raise image_not_found(ref.image)
        check_version(found, ref.resource_version, what=f"image {found.value.name}")
        return found.value

    def _check_unused(self, image: Image) -> None:
        users = users_of(self._view, image.id)
        if not users:
            return
        shown = ", ".join(users[:_USERS_SHOWN])
        more = f" and {len(users) - _USERS_SHOWN} more" if len(users) > _USERS_SHOWN else ""
        raise FailedPrecondition(
            f"image {image.name} is used by {shown}{more}: delete them first, or force the deletion (they run on, but "
            "cannot be made again elsewhere)",
            reason="IMAGE_IN_USE",
            metadata={"image": image.name, "instances": ",".join(users[:100]), "count": str(len(users))},
        )


def _name_taken(header: ImportHeader) -> AlreadyExists:
    return AlreadyExists(
        f"project {header.project} has another image named {header.name}: choose another name, or delete that one "
        "first",
        reason="IMAGE_NAME_TAKEN",
        metadata={"image": header.name, "project": header.project},
    )


def _being_deleted(image: Image) -> FailedPrecondition:
    return FailedPrecondition(
        f"image {image.name} is being deleted: try again when it is gone",
        reason="IMAGE_BEING_DELETED",
        metadata={"image": image.name, "image_id": image.id},
    )
