"""What the manager of instances asks of images: those of an instance, as files of this node."""

from collections.abc import Sequence
from typing import Protocol

from hypervisor.agent.drivers.driver import LocalImage
from hypervisor.core.images import ImageSource

__all__ = ["ImageProvider", "NoImages"]


class ImageProvider(Protocol):
    """Gives instances their images and keeps those in use. Idempotent; one call for an instance at a time."""

    async def obtain(self, instance_id: str, sources: Sequence[ImageSource]) -> dict[str, LocalImage]:
        """The images by name, fetched where they are not here. Their files stay until ``release``, whatever happens.

        NotFound (``IMAGE_NOT_FOUND``), Unavailable (``IMAGE_FETCH_FAILED``), FailedPrecondition (``IMAGE_CORRUPT``),
        ResourceExhausted (``IMAGE_CACHE_FULL``, ``DISK_FULL``). May be cancelled: what was fetched is kept, to go on
        from.
        """
        ...

    async def release(self, instance_id: str, *, digests: Sequence[str] | None = None) -> None:
        """The instance needs them no more (all, or those with these digests): they may be collected. Never fails."""
        ...


class NoImages:
    """For simulated nodes, whose driver reads no files: every image is as good as here."""

    async def obtain(self, instance_id: str, sources: Sequence[ImageSource]) -> dict[str, LocalImage]:
        return {}

    async def release(self, instance_id: str, *, digests: Sequence[str] | None = None) -> None:
        return
