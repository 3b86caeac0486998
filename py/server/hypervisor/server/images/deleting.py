"""The two steps of an image's delete, as decisions for one commit each.

Two, as an instance that names it may be made on another server at this moment. From the first on no new one can be; who
has seen it has also seen every one that was made before, and can take the second. The first says what was asked for, so
that the leader can take the second for a server that died in between.
"""

from msgspec import structs

from hypervisor.core.images import Image, ImageDeletion, ImageState
from hypervisor.core.model import OperationRecord
from hypervisor.core.states import OperationState
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.store.storage import Compare
from hypervisor.server.view import StoreView

__all__ = ["finish_delete", "finish_for_another", "mark_deleting", "users_of"]


def users_of(view: StoreView, image_id: str) -> list[str]:
    """Names of the instances that were made with it."""
    return sorted(found.value.name for found in view.instances() if image_id in found.value.images.values())


def mark_deleting(draft: Draft, image: Image, operation: OperationRecord, *, force: bool) -> Image:
    """The first step. ``operation``: the delete's, to be recorded as done by the second."""
    operation = structs.replace(operation, object_id=image.id, object_name=image.name)
    marked = structs.replace(
        image, state=ImageState.DELETING, deletion=ImageDeletion(operation=operation, force=force)
    )
    draft.put(keys.image(image.id), marked)
    return marked


def finish_delete(draft: Draft, image: Image, deletion: ImageDeletion | None, *, used: bool) -> bool:
    """The second step, with the image as it is in the draft; whether it is gone. One that is used, as far as a view
    knows that has seen the first step, is kept unless it was forced."""
    if used and not (deletion is not None and deletion.force):
        draft.put(keys.image(image.id), structs.replace(image, state=ImageState.READY, deletion=None))
        return False
    draft.delete(keys.image(image.id))
    draft.delete(keys.image_name(image.project, image.name))
    if deletion is not None:
        done = structs.replace(
            deletion.operation, state=OperationState.SUCCEEDED, progress_percent=100, finished_at=draft.now
        )
        draft.put(keys.operation(done.id), done)
    return True


def finish_for_another(draft: Draft, image_id: str, *, view: StoreView, fence: Compare) -> bool:
    """The second step by the leader, whose view has the image DELETING; whether there was anything to do."""
    draft.guard(fence)
    found = draft.get(keys.image(image_id))
    if found is None or found.value.state is not ImageState.DELETING:
        return False
    used = bool(users_of(view, image_id))
    finish_delete(draft, found.value, found.value.deletion, used=used)
    return True
