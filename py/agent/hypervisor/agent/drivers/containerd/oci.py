"""OCI image documents: manifest, index and configuration as values, and the choice of a platform. Pure.

Documents come from archives of unknown origin, so everything is bounded and checked here; what is wrong is
InvalidArgument (``IMAGE_INVALID``) with a sentence that names the document.
"""

import hashlib
import platform
import re
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.names import shorten

__all__ = [
    "DOCKER_LIST",
    "DOCKER_MANIFEST",
    "MAX_DOCUMENT_BYTES",
    "MAX_LAYERS",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_MANIFEST",
    "REF_NAME",
    "Descriptor",
    "ImageConfig",
    "Index",
    "Manifest",
    "ProcessConfig",
    "chain_ids",
    "check_digest",
    "digest_of",
    "host_architecture",
    "invalid_image",
    "is_index",
    "is_manifest",
    "parse_config",
    "parse_index",
    "parse_manifest",
    "select_platform",
]

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
REF_NAME = "org.opencontainers.image.ref.name"

MAX_DOCUMENT_BYTES = 4 << 20
"""Longest manifest, index or configuration; the limit registries have."""
MAX_LAYERS = 127
"""As many as overlayfs is asked to stack."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LAYER_TYPE = re.compile(
    r"application/vnd\.(oci\.image\.layer\.v1\.tar|docker\.image\.rootfs\.diff\.tar)([.+](gzip|zstd))?"
)
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "riscv64": "riscv64",
    "s390x": "s390x",
    "ppc64le": "ppc64le",
}


class Platform(msgspec.Struct, frozen=True):
    """What an image was built for."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A reference to a blob."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image index (or Docker manifest list)."""

    manifests: tuple[Descriptor, ...]
    media_type: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image manifest."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = ""


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """What an image says of the process to run."""

    user: str = ""
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str = ""
    stop_signal: str = ""


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An image's configuration."""

    rootfs: _RootFs
    architecture: str = ""
    os: str = ""
    config: ProcessConfig | None = None


Document = TypeVar("Document", Index, Manifest, ImageConfig)


def invalid_image(image: str, problem: str) -> InvalidArgument:
    """The error for an image that cannot be used."""
    return InvalidArgument(
        f"spec.image: {shorten(image, 200)} is no usable image: {problem}",
        reason="IMAGE_INVALID",
        metadata={"image": image[:1024], "problem": problem},
    )


def digest_of(data: bytes) -> str:
    """The SHA-256 digest of a blob, as OCI writes it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_digest(image: str, digest: str) -> str:
    """The digest, if it is a SHA-256 one: it becomes part of file names."""
    if not _DIGEST.fullmatch(digest):
        raise invalid_image(image, f"digest {shorten(digest, 80)} is not of the form sha256:<64 hex digits>")
    return digest


def host_architecture() -> str:
    """This machine's architecture, as OCI calls it."""
    machine = platform.machine()
    return _MACHINES.get(machine, machine)


def is_index(media_type: str) -> bool:
    """Whether a blob of this type lists manifests."""
    return media_type in (OCI_INDEX, DOCKER_LIST)


def is_manifest(media_type: str) -> bool:
    """Whether a blob of this type is one image's manifest."""
    return media_type in (OCI_MANIFEST, DOCKER_MANIFEST)


def _parse(image: str, data: bytes, kind: type[Document], title: str) -> Document:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise invalid_image(
            image, f"its {title} is {len(data)} bytes long; at most {MAX_DOCUMENT_BYTES} are allowed"
        )
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise invalid_image(image, f"its {title} is not legal: {exc}") from exc


def _check_descriptor(image: str, descriptor: Descriptor, title: str) -> None:
    check_digest(image, descriptor.digest)
    if descriptor.size < 0:
        raise invalid_image(image, f"the size of its {title} is negative")


def parse_index(image: str, data: bytes) -> Index:
    """The index in these bytes."""
    index = _parse(image, data, Index, "index")
    for descriptor in index.manifests:
        _check_descriptor(image, descriptor, "manifest")
    return index


def parse_manifest(image: str, data: bytes) -> Manifest:
    """The manifest in these bytes, its layers of types that can be unpacked."""
    manifest = _parse(image, data, Manifest, "manifest")
    _check_descriptor(image, manifest.config, "configuration")
    if not manifest.layers:
        raise invalid_image(image, "it has no layers")
    if len(manifest.layers) > MAX_LAYERS:
        raise invalid_image(
            image, f"it has {len(manifest.layers)} layers; at most {MAX_LAYERS} can be stacked"
        )
    for layer in manifest.layers:
        _check_descriptor(image, layer, "layer")
        if not _LAYER_TYPE.fullmatch(layer.media_type):
            raise invalid_image(image, f"a layer is of the unknown type {shorten(layer.media_type, 100)}")
    return manifest


def parse_config(image: str, data: bytes, *, layers: int) -> ImageConfig:
    """The configuration in these bytes, for a manifest with this many layers."""
    config = _parse(image, data, ImageConfig, "configuration")
    for digest in config.rootfs.diff_ids:
        check_digest(image, digest)
    if len(config.rootfs.diff_ids) != layers:
        raise invalid_image(
            image, f"its configuration names {len(config.rootfs.diff_ids)} layers, its manifest {layers}"
        )
    if config.os not in ("", "linux"):
        raise invalid_image(image, f"it is for {shorten(config.os, 40)}, not for linux")
    if config.architecture not in ("", host_architecture()):
        raise invalid_image(
            image, f"it is for {shorten(config.architecture, 40)}, and this node is {host_architecture()}"
        )
    return config


def select_platform(image: str, manifests: Sequence[Descriptor], *, architecture: str) -> Descriptor:
    """The manifest for this architecture; one without a platform is taken if it is the only one."""
    usable = [m for m in manifests if is_manifest(m.media_type) or is_index(m.media_type) or not m.media_type]
    for manifest in usable:
        wanted = manifest.platform
        if wanted is not None and wanted.os == "linux" and wanted.architecture == architecture:
            return manifest
    unnamed = [m for m in usable if m.platform is None]
    if len(unnamed) == 1:
        return unnamed[0]
    offered = sorted({f"{m.platform.os}/{m.platform.architecture}" for m in usable if m.platform is not None})
    found = f"it offers {', '.join(offered[:10])}" if offered else "it offers none"
    raise invalid_image(image, f"it has no variant for linux/{architecture}: {found}")


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """The names of the snapshots after each layer (OCI image specification, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(diff_id if not chain else digest_of(f"{chain[-1]} {diff_id}".encode()))
    return tuple(chain)
