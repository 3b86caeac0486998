"""Image archives on the node's disk: OCI layout tars and ``docker save`` tars, read without being unpacked.

Archives are of unknown origin. Nothing of one is ever written to the file system here: members are located, checked and
read in place by offset. Everything in this module blocks; call it in a thread. What is wrong with an archive is
InvalidArgument (``IMAGE_INVALID``).
"""

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from hypervisor.agent.drivers.containerd import oci
from hypervisor.core.errors import InvalidArgument, NotFound
from hypervisor.core.names import shorten

__all__ = ["Archive", "ArchiveImage", "Blob", "Fingerprint", "open_archive"]

_MAX_MEMBERS = 10_000
_MAX_HEADER_BYTES = 32 << 20
_CHUNK = 1 << 20
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Tells one content of a file from another without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob of an image: its descriptor, and where in the archive it is or, for one made here, its bytes."""

    descriptor: oci.Descriptor
    offset: int = 0
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class ArchiveImage:
    """One image of an archive, for this machine's architecture."""

    manifest: Blob
    config: Blob
    layers: tuple[Blob, ...]
    diff_ids: tuple[str, ...]
    process: oci.ProcessConfig


class _DockerEntry(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: tuple[str, ...]
    repo_tags: tuple[str, ...] | None = None


def open_archive(path: Path, *, roots: tuple[Path, ...], image: str) -> "Archive":
    """Open the archive at ``path``, which has to lie inside one of ``roots`` without any symbolic link below it.

    Raises InvalidArgument (``ARCHIVE_NOT_ALLOWED``, ``IMAGE_INVALID``) or NotFound (``IMAGE_NOT_FOUND``).
    """
    if not path.is_absolute() or ".." in path.parts:
        raise oci.invalid_image(image, "the archive's path must be absolute and without '..'")
    root = next((root for root in roots if path.is_relative_to(root) and path != root), None)
    if root is None:
        allowed = ", ".join(str(r) for r in roots) or "none is configured"
        raise InvalidArgument(
            f"spec.image: {path} is outside the directories this node imports images from ({allowed}): move the "
            "archive there, or add its directory to images.archive_roots in the agent's configuration",
            reason="ARCHIVE_NOT_ALLOWED",
            metadata={"path": str(path)},
        )
    try:
        fd = _open_beneath(root, path.relative_to(root).parts, image)
    except FileNotFoundError as exc:
        raise NotFound(
            f"spec.image: the archive {path} does not exist on this node: copy it there first",
            reason="IMAGE_NOT_FOUND",
            metadata={"image": image[:1024], "path": str(path)},
        ) from exc
    except OSError as exc:
        raise oci.invalid_image(image, f"the archive cannot be opened: {exc.strerror}") from exc
    return Archive(fd, image)


def _open_beneath(root: Path, parts: tuple[str, ...], image: str) -> int:
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = inner
            mode = os.fstat(directory).st_mode
            if not stat.S_ISDIR(mode):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "no directory"
                raise oci.invalid_image(image, f"{part!r} in the archive's path is {what}")
        # O_PATH first: opening a FIFO or a device for reading could block or act.
        probe = os.open(parts[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            mode = os.fstat(probe).st_mode
            if not stat.S_ISREG(mode):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
                raise oci.invalid_image(image, f"the archive is {what}")
            return os.open(f"/proc/self/fd/{probe}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(probe)
    finally:
        os.close(directory)


class _Headers(io.BufferedReader):
    """The file as tarfile reads it: headers only, and no more of them than any real archive has.

    Extended headers (long names, pax) are read into memory by the length they claim.
    """

    _left = _MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= self._left + 1 if size is None or size < 0 else size
        if self._left < 0:
            raise tarfile.ReadError(f"its headers are longer than {_MAX_HEADER_BYTES} bytes")
        return super().read(size)


class Archive:
    """An open archive; close it with ``close`` or ``with``."""

    def __init__(self, fd: int, image: str) -> None:
        self._fd = fd
        self._image = image
        status = os.fstat(fd)
        self.fingerprint = Fingerprint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_chunks(self, blob: Blob, *, chunk_bytes: int = _CHUNK) -> Iterator[bytes]:
        """The blob's bytes, in order."""
        if blob.data is not None:
            for start in range(0, len(blob.data), chunk_bytes):
                yield blob.data[start : start + chunk_bytes]
            return
        position, end = blob.offset, blob.offset + blob.descriptor.size
        while position < end:
            data = os.pread(self._fd, min(chunk_bytes, end - position), position)
            if not data:
                self._fail("the archive became shorter while it was read")
            yield data
            position += len(data)

    def find_image(self, tag: str) -> ArchiveImage:
        """The image ``tag`` (``name:tag`` or a part of it), or the only one where ``tag`` is empty."""
        members = self._members()
        if "index.json" in members:
            return self._from_layout(members, tag)
        if "manifest.json" in members:
            return self._from_docker(members, tag)
        problem = "it holds neither index.json (OCI layout) nor manifest.json (docker save)"
        raise oci.invalid_image(self._image, problem)

    def _fail(self, problem: str) -> NoReturn:
        raise oci.invalid_image(self._image, problem)

    def _members(self) -> Mapping[str, tuple[int, int]]:
        """Offset and size of every regular file."""
        head = os.pread(self._fd, 8, 0)
        if any(head.startswith(magic) for magic in _COMPRESSED_MAGIC):
            self._fail("the archive is compressed: give it as a plain .tar file")
        found: dict[str, tuple[int, int]] = {}
        try:
            # From the beginning: the descriptor's offset is wherever an earlier look left it.
            os.lseek(self._fd, 0, os.SEEK_SET)
            with (
                _Headers(io.FileIO(self._fd, closefd=False)) as file,
                tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive,
            ):
                for count, member in enumerate(archive):
                    if count >= _MAX_MEMBERS:
                        self._fail(f"the archive has more than {_MAX_MEMBERS} members")
                    if name := self._checked_name(member):
                        if name in found:
                            self._fail(f"the archive has {shorten(name)} twice")
                        found[name] = (member.offset_data, member.size)
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as exc:
            self._fail(f"the file is no tar archive, or is damaged or cut short: {exc}")
        return found

    def _checked_name(self, member: tarfile.TarInfo) -> str | None:
        """The member's plain name; None for a directory."""
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if member.name.startswith("/") or ".." in parts:
            self._fail(f"the archive has a member outside of it, {shorten(member.name)}")
        if member.isdir():
            return None
        if not member.isreg() or member.issparse():
            self._fail(f"the archive's member {shorten(member.name)} is not an ordinary file")
        if member.size < 0 or member.offset_data + member.size > self.fingerprint.size:
            self._fail(f"the archive is cut short: {shorten(member.name)} is not all there")
        return "/".join(parts)

    def _document(self, members: Mapping[str, tuple[int, int]], name: str, title: str) -> bytes:
        place = members.get(name)
        if place is None:
            self._fail(f"its {title} ({shorten(name, 100)}) is not in the archive")
        offset, size = place
        if size > oci.MAX_DOCUMENT_BYTES:
            self._fail(f"its {title} is {size} bytes long; at most {oci.MAX_DOCUMENT_BYTES} are allowed")
        return b"".join(self.read_chunks(Blob(oci.Descriptor(digest="", size=size), offset)))

    def _blob_name(self, descriptor: oci.Descriptor) -> str:
        return "blobs/" + oci.check_digest(self._image, descriptor.digest).replace(":", "/")

    def _verified(
        self, members: Mapping[str, tuple[int, int]], descriptor: oci.Descriptor, title: str
    ) -> bytes:
        data = self._document(members, self._blob_name(descriptor), title)
        if len(data) != descriptor.size or oci.digest_of(data) != descriptor.digest:
            self._fail(
                f"its {title} does not have the digest and size it is listed with ({descriptor.digest})"
            )
        return data

    def _located(
        self, members: Mapping[str, tuple[int, int]], descriptor: oci.Descriptor, title: str
    ) -> Blob:
        place = members.get(self._blob_name(descriptor))
        if place is None:
            self._fail(f"its {title} {descriptor.digest} is not in the archive")
        if place[1] != descriptor.size:
            self._fail(
                f"its {title} {descriptor.digest} is {place[1]} bytes long and listed with {descriptor.size}"
            )
        return Blob(descriptor, place[0])

    def _from_layout(self, members: Mapping[str, tuple[int, int]], tag: str) -> ArchiveImage:
        index = oci.parse_index(self._image, self._document(members, "index.json", "index"))
        candidates = index.manifests
        if tag:
            candidates = tuple(m for m in candidates if _names(m, tag))
            if not candidates:
                self._fail(f"the archive has no image named {shorten(tag)}; {_listing(index.manifests)}")
        elif (
            len({m.digest for m in candidates}) > 1
            and len({(m.annotations or {}).get(oci.REF_NAME) for m in candidates}) > 1
        ):
            self._fail(f"the archive has several images: add '#name:tag' to its path; {_listing(candidates)}")
        descriptor = oci.select_platform(self._image, candidates, architecture=oci.host_architecture())
        for _ in range(3):
            data = self._verified(members, descriptor, "manifest")
            if not oci.is_index(descriptor.media_type):
                break
            nested = oci.parse_index(self._image, data)
            descriptor = oci.select_platform(
                self._image, nested.manifests, architecture=oci.host_architecture()
            )
        else:
            self._fail("its indexes are nested too deeply")
        manifest = oci.parse_manifest(self._image, data)
        config_data = self._verified(members, manifest.config, "configuration")
        config = oci.parse_config(self._image, config_data, layers=len(manifest.layers))
        media_type = descriptor.media_type or manifest.media_type or oci.OCI_MANIFEST
        return ArchiveImage(
            manifest=Blob(
                oci.Descriptor(digest=descriptor.digest, size=descriptor.size, media_type=media_type),
                data=data,
            ),
            config=Blob(manifest.config, data=config_data),
            layers=tuple(self._located(members, layer, "layer") for layer in manifest.layers),
            diff_ids=config.rootfs.diff_ids,
            process=config.config or oci.ProcessConfig(),
        )

    def _from_docker(self, members: Mapping[str, tuple[int, int]], tag: str) -> ArchiveImage:
        try:
            entries = msgspec.json.decode(
                self._document(members, "manifest.json", "manifest"), type=tuple[_DockerEntry, ...]
            )
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            self._fail(f"its manifest.json is not legal: {exc}")
        if tag:
            entries = tuple(e for e in entries if any(_matches(t, tag) for t in e.repo_tags or ()))
        if len(entries) != 1:
            self._fail(
                f"the archive has {len(entries)} images{f' named {shorten(tag)}' if tag else ''}: "
                "add '#name:tag' of one of them to its path"
            )
        entry = entries[0]
        config_data = self._document(members, entry.config, "configuration")
        config = oci.parse_config(self._image, config_data, layers=len(entry.layers))
        layers = []
        for name, diff_id in zip(entry.layers, config.rootfs.diff_ids, strict=True):
            if name not in members:
                self._fail(f"its layer {shorten(name, 100)} is not in the archive")
            offset, size = members[name]
            descriptor = oci.Descriptor(digest=diff_id, size=size, media_type=oci.OCI_LAYER)
            blob = Blob(descriptor, offset)
            if self._hash(blob) != diff_id:
                self._fail(f"its layer {shorten(name, 100)} does not have the digest {diff_id}")
            layers.append(blob)
        config_descriptor = oci.Descriptor(
            digest=oci.digest_of(config_data), size=len(config_data), media_type=oci.OCI_CONFIG
        )
        # docker save has no manifest of digests: this is the one a registry would have made of it.
        document = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": _as_json(config_descriptor),
            "layers": [_as_json(layer.descriptor) for layer in layers],
        }
        data = msgspec.json.encode(document, order="sorted")
        oci.parse_manifest(self._image, data)
        manifest = oci.Descriptor(digest=oci.digest_of(data), size=len(data), media_type=oci.OCI_MANIFEST)
        return ArchiveImage(
            manifest=Blob(manifest, data=data),
            config=Blob(config_descriptor, data=config_data),
            layers=tuple(layers),
            diff_ids=config.rootfs.diff_ids,
            process=config.config or oci.ProcessConfig(),
        )

    def _hash(self, blob: Blob) -> str:
        hasher = hashlib.sha256()
        for chunk in self.read_chunks(blob):
            hasher.update(chunk)
        return "sha256:" + hasher.hexdigest()


def _as_json(descriptor: oci.Descriptor) -> dict[str, object]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def _matches(name: str, tag: str) -> bool:
    """Whether a recorded name is the wanted one: equal, or equal after a registry or repository is left out."""
    return name == tag or name.endswith(("/" + tag, ":" + tag))


def _names(descriptor: oci.Descriptor, tag: str) -> bool:
    annotations = descriptor.annotations or {}
    return any(
        _matches(annotations[key], tag)
        for key in (oci.REF_NAME, "io.containerd.image.name")
        if key in annotations
    )


def _listing(manifests: tuple[oci.Descriptor, ...]) -> str:
    names = sorted({(m.annotations or {}).get(oci.REF_NAME, "") for m in manifests} - {""})
    return (
        f"it has {', '.join(shorten(name) for name in names[:10])}" if names else "its images have no names"
    )
