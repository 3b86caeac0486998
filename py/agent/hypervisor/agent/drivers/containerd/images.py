"""Images: found in the namespace or imported from an archive, unpacked, and known by what a container needs of them."""

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

import structlog
from containerd_api.services.diff.v1 import diff_pb2
from containerd_api.services.images.v1 import images_pb2
from containerd_api.services.snapshots.v1 import snapshots_pb2
from containerd_api.types import descriptor_pb2

from hypervisor.agent.drivers.containerd import oci
from hypervisor.agent.drivers.containerd.accounts import ROOT, Account, resolve_account
from hypervisor.agent.drivers.containerd.archive import Archive, ArchiveImage, Blob, Fingerprint, open_archive
from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.config import ContainerdConfig
from hypervisor.agent.drivers.containerd.content import ContentStore
from hypervisor.agent.drivers.containerd.rootfs import read_accounts
from hypervisor.agent.drivers.keyed_locks import KeyedLocks
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.core.clock import Clock
from hypervisor.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from hypervisor.core.ids import IdSource
from hypervisor.core.names import shorten

__all__ = ["ARCHIVE_SCHEME", "ImageStore", "ResolvedImage"]

ARCHIVE_SCHEME = "oci-archive:"
_IMPORTED_NAME = "hypervisor.internal/archive@"
_KEPT_RESOLUTIONS = 1024
_PARALLEL_WRITES = 3

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedImage:
    """What a container needs of an image."""

    name: str
    """Its name in containerd's namespace."""
    digest: str
    """Of what the name points to."""
    layers: tuple[oci.Descriptor, ...]
    diff_ids: tuple[str, ...]
    config_digest: str
    config: oci.ProcessConfig
    account: Account

    @property
    def chain_id(self) -> str:
        """Name of the snapshot that holds its file system."""
        return oci.chain_ids(self.diff_ids)[-1]


@dataclass(frozen=True, slots=True)
class _Imported:
    fingerprint: Fingerprint
    name: str


class ImageStore:
    """Resolves image references; see :meth:`resolve`.

    What an image is follows from its digest, so resolutions are remembered by it (the last 1,024); what a name
    points to is asked of containerd every time.
    """

    def __init__(self, client: Client, config: ContainerdConfig, *, clock: Clock, new_id: IdSource) -> None:
        self._client = client
        self._config = config
        self._new_id = new_id
        self._content = ContentStore(client, clock=clock, new_id=new_id, timeout_s=config.image_timeout_s)
        self._locks = KeyedLocks()
        self._resolved: dict[str, ResolvedImage] = {}
        self._imported: dict[str, _Imported] = {}

    async def resolve(self, reference: str, *, archive: Path | None = None) -> ResolvedImage:
        """The image of ``spec.image``, unpacked when this returns.

        ``archive``: the file of an image of the cluster, whole and verified, that the reference names.

        An ``oci-archive:PATH[#NAME:TAG]`` is imported unless that content was before. Any number of calls for one image
        import and unpack it once. Raises NotFound (``IMAGE_NOT_FOUND``), InvalidArgument (``IMAGE_INVALID``) and what
        :meth:`Client.call` raises; a failed import leaves nothing.
        """
        if not reference:
            raise InvalidArgument.of_field(
                "spec.image", "is required: give an image of the node or oci-archive:PATH"
            )
        if archive is not None:
            name, target = await self._from_file(reference, archive, roots=(archive.parent,), tag="")
        elif reference.startswith(ARCHIVE_SCHEME):
            name, target = await self._from_archive(reference)
        else:
            name = reference
            found = await self._target(reference)
            if found is None:
                raise self._not_found(reference)
            target = found
        known = self._resolved.get(target.digest)
        if known is not None and known.name == name:
            return known
        async with self._locks.hold(target.digest):
            known = self._resolved.get(target.digest)
            if known is None or known.name != name:
                known = await self._load(reference, name, target)
                self._remember(known)
            return known

    async def unpack_again(self, image: ResolvedImage) -> None:
        """Bring back the image's file system after somebody removed it from containerd."""
        async with self._locks.hold(image.digest), self._content.lease() as lease:
            await self._unpack(image.name, image.layers, image.diff_ids, image.config_digest, lease=lease)

    def _remember(self, image: ResolvedImage) -> None:
        self._resolved.pop(image.digest, None)
        if len(self._resolved) >= _KEPT_RESOLUTIONS:
            del self._resolved[next(iter(self._resolved))]
        self._resolved[image.digest] = image

    async def _target(self, name: str) -> oci.Descriptor | None:
        try:
            reply = await self._client.call(
                self._client.images.Get, images_pb2.GetImageRequest(name=name), what=f"look up image {name}"
            )
        except NotFound:
            return None
        target = reply.image.target
        oci.check_digest(name, target.digest)
        return oci.Descriptor(digest=target.digest, size=target.size, media_type=target.media_type)

    def _not_found(self, reference: str) -> NotFound:
        ctr = f"ctr -n {self._config.namespace} images"
        return NotFound(
            f"spec.image: {shorten(reference, 200)} is not on this node: import it there with '{ctr} import FILE.tar' "
            f"(or pull it with '{ctr} pull NAME', by its full name such as docker.io/library/busybox:1.36), or give "
            "oci-archive:/path/on/the/node.tar",
            reason="IMAGE_NOT_FOUND",
            metadata={"image": reference[:1024]},
        )

    async def _load(self, reference: str, name: str, target: oci.Descriptor) -> ResolvedImage:
        """Read the documents of an image that containerd has, and unpack it."""
        async with self._content.lease() as lease:
            descriptor = target
            data = await self._content.read(descriptor, image=reference, title="manifest")
            if oci.is_index(descriptor.media_type):
                index = oci.parse_index(reference, data)
                descriptor = oci.select_platform(
                    reference, index.manifests, architecture=oci.host_architecture()
                )
                data = await self._content.read(descriptor, image=reference, title="manifest")
            manifest = oci.parse_manifest(reference, data)
            config_data = await self._content.read(manifest.config, image=reference, title="configuration")
            config = oci.parse_config(reference, config_data, layers=len(manifest.layers))
            return await self._unpacked(
                reference,
                name,
                digest=target.digest,
                layers=manifest.layers,
                diff_ids=config.rootfs.diff_ids,
                config_digest=manifest.config.digest,
                process=config.config or oci.ProcessConfig(),
                lease=lease,
            )

    async def _unpacked(
        self,
        reference: str,
        name: str,
        *,
        digest: str,
        layers: tuple[oci.Descriptor, ...],
        diff_ids: tuple[str, ...],
        config_digest: str,
        process: oci.ProcessConfig,
        lease: str,
    ) -> ResolvedImage:
        """Unpack an image whose documents are known and resolve its account."""
        await self._unpack(reference, layers, diff_ids, config_digest, lease=lease)
        account = await self._account(reference, process.user, oci.chain_ids(diff_ids)[-1], lease=lease)
        return ResolvedImage(
            name=name,
            digest=digest,
            layers=layers,
            diff_ids=diff_ids,
            config_digest=config_digest,
            config=process,
            account=account,
        )

    async def _account(self, reference: str, user: str, chain_id: str, *, lease: str) -> Account:
        if user in ("", "0", "root", "0:0", "root:root"):
            return ROOT
        key = self._new_id("v")
        reply = await self._client.call(
            self._client.snapshots.View,
            snapshots_pb2.ViewSnapshotRequest(snapshotter=self._config.snapshotter, key=key, parent=chain_id),
            what="look into the image",
            lease=lease,
        )
        try:
            passwd, group = await asyncio.to_thread(read_accounts, tuple(reply.mounts))
        finally:
            await uninterrupted(self._remove_snapshot(key))
        try:
            return resolve_account(user, passwd=passwd, group=group)
        except ValueError as exc:
            raise oci.invalid_image(reference, str(exc)) from exc

    async def _remove_snapshot(self, key: str) -> None:
        try:
            await self._client.call(
                self._client.snapshots.Remove,
                snapshots_pb2.RemoveSnapshotRequest(snapshotter=self._config.snapshotter, key=key),
                what="remove a temporary snapshot",
            )
        except NotFound:
            return

    # Import.

    async def _from_archive(self, reference: str) -> tuple[str, oci.Descriptor]:
        """Name and target of an archive's image, imported unless this content of the file was before."""
        path_text, _, tag = reference.removeprefix(ARCHIVE_SCHEME).partition("#")
        if not path_text or "\0" in path_text or len(path_text) > 4096:
            raise oci.invalid_image(
                reference, "give the path of the archive: oci-archive:/path/on/the/node.tar"
            )
        return await self._from_file(reference, Path(path_text), roots=self._config.archive_roots, tag=tag)

    async def _from_file(
        self, reference: str, path: Path, *, roots: tuple[Path, ...], tag: str
    ) -> tuple[str, oci.Descriptor]:
        opening = asyncio.ensure_future(asyncio.to_thread(open_archive, path, roots=roots, image=reference))
        try:
            archive = await uninterrupted(opening)
        except asyncio.CancelledError:
            if not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            raise
        with archive:
            if found := await self._imported_before(reference, archive.fingerprint):
                return found
            async with self._locks.hold(reference):
                if found := await self._imported_before(reference, archive.fingerprint):
                    return found
                name, target = await self._import_archive(reference, archive, tag)
                if len(self._imported) >= _KEPT_RESOLUTIONS:
                    del self._imported[next(iter(self._imported))]
                self._imported[reference] = _Imported(archive.fingerprint, name)
                return name, target

    async def _imported_before(
        self, reference: str, fingerprint: Fingerprint
    ) -> tuple[str, oci.Descriptor] | None:
        imported = self._imported.get(reference)
        if imported is None or imported.fingerprint != fingerprint:
            return None
        target = await self._target(imported.name)
        return None if target is None else (imported.name, target)

    async def _import_archive(self, reference: str, archive: Archive, tag: str) -> tuple[str, oci.Descriptor]:
        # To its end even when cancelled: the thread would go on with a descriptor that is closed, or somebody else's.
        image = await uninterrupted(asyncio.to_thread(archive.find_image, tag))
        # Named by content: two archives that call different images the same never disturb one another.
        name = _IMPORTED_NAME + image.manifest.descriptor.digest
        target = image.manifest.descriptor
        async with self._locks.hold(target.digest), self._content.lease() as lease:
            await self._store(reference, archive, image, lease=lease)
            resolved = await self._unpacked(
                reference,
                name,
                digest=target.digest,
                layers=tuple(layer.descriptor for layer in image.layers),
                diff_ids=image.diff_ids,
                config_digest=image.config.descriptor.digest,
                process=image.process,
                lease=lease,
            )
            with contextlib.suppress(AlreadyExists):
                await self._client.call(
                    self._client.images.Create,
                    images_pb2.CreateImageRequest(
                        image=images_pb2.Image(
                            name=name,
                            target=descriptor_pb2.Descriptor(
                                media_type=target.media_type, digest=target.digest, size=target.size
                            ),
                        )
                    ),
                    what=f"record image {name}",
                    lease=lease,
                )
            self._remember(resolved)
        _log.info("image_imported", image=reference, name=name)
        return name, target

    async def _store(self, reference: str, archive: Archive, image: ArchiveImage, *, lease: str) -> None:
        """Write all blobs; the manifest last, with what keeps the others from being collected."""
        slots = asyncio.Semaphore(_PARALLEL_WRITES)

        async def write(blob: Blob, labels: dict[str, str]) -> None:
            async with slots:
                try:
                    await self._content.write(
                        blob.descriptor, archive.read_chunks(blob), labels=labels, lease=lease
                    )
                except FailedPrecondition as exc:
                    # containerd's answer to wrong bytes: "unexpected commit digest" or "... size".
                    if "unexpected commit" not in exc.message:
                        raise
                    raise oci.invalid_image(
                        reference,
                        f"a blob does not have the digest and size it is listed with ({exc.message})",
                    ) from exc

        references = {"containerd.io/gc.ref.content.0": image.config.descriptor.digest}
        for number, layer in enumerate(image.layers, start=1):
            references[f"containerd.io/gc.ref.content.{number}"] = layer.descriptor.digest
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(write(image.config, {}))
                unique = {layer.descriptor.digest: layer for layer in image.layers}
                for layer in unique.values():
                    group.create_task(write(layer, {}))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        await write(image.manifest, references)

    # Unpack.

    async def _unpack(
        self,
        reference: str,
        layers: tuple[oci.Descriptor, ...],
        diff_ids: tuple[str, ...],
        config_digest: str,
        *,
        lease: str,
    ) -> None:
        """Make the snapshot of every layer that has none, and bind the last one to the image's configuration."""
        chain = oci.chain_ids(diff_ids)
        first_missing = len(chain)
        while first_missing > 0 and not await self._has_snapshot(chain[first_missing - 1]):
            first_missing -= 1
        for number in range(first_missing, len(chain)):
            # Images share layers: whoever comes second finds it done.
            async with self._locks.hold("layer " + chain[number]):
                if not await self._has_snapshot(chain[number]):
                    parent = chain[number - 1] if number else ""
                    await self._unpack_layer(
                        reference,
                        layers[number],
                        diff_ids[number],
                        parent=parent,
                        name=chain[number],
                        lease=lease,
                    )
        await self._content.label(
            config_digest, {f"containerd.io/gc.ref.snapshot.{self._config.snapshotter}": chain[-1]}
        )

    async def _has_snapshot(self, name: str) -> bool:
        try:
            await self._client.call(
                self._client.snapshots.Stat,
                snapshots_pb2.StatSnapshotRequest(snapshotter=self._config.snapshotter, key=name),
                what=f"look up snapshot {name}",
            )
        except NotFound:
            return False
        return True

    async def _unpack_layer(
        self, reference: str, layer: oci.Descriptor, diff_id: str, *, parent: str, name: str, lease: str
    ) -> None:
        snapshotter = self._config.snapshotter
        key = f"{self._new_id('u')}-{name}"
        prepared = await self._client.call(
            self._client.snapshots.Prepare,
            snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent),
            what="prepare a layer",
            lease=lease,
        )
        committed = False
        try:
            try:
                applied = await self._client.call(
                    self._client.diff.Apply,
                    diff_pb2.ApplyRequest(
                        diff=descriptor_pb2.Descriptor(
                            media_type=layer.media_type, digest=layer.digest, size=layer.size
                        ),
                        mounts=prepared.mounts,
                    ),
                    what=f"unpack layer {layer.digest}",
                    timeout_s=self._config.image_timeout_s,
                    lease=lease,
                )
            except FailedPrecondition as exc:
                raise oci.invalid_image(reference, f"a layer cannot be unpacked: {exc.message}") from exc
            if applied.applied.digest != diff_id:
                raise oci.invalid_image(
                    reference,
                    f"a layer unpacks to {applied.applied.digest}, and its configuration says {diff_id}",
                )
            try:
                await self._client.call(
                    self._client.snapshots.Commit,
                    snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, name=name, key=key),
                    what="commit a layer",
                    lease=lease,
                )
                committed = True
            except AlreadyExists:
                # Somebody outside of this agent was faster; the content is the same by its name.
                pass
        finally:
            if not committed:
                await uninterrupted(self._remove_snapshot(key))
