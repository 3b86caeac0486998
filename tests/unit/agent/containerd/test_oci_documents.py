"""Manifests, indexes and configurations of images."""

import hashlib
import json
from typing import Any

import pytest

from hypervisor.agent.drivers.containerd import oci
from hypervisor.core.errors import InvalidArgument

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


def manifest(**changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "config": {"mediaType": oci.OCI_CONFIG, "digest": A, "size": 2},
        "layers": [{"mediaType": oci.OCI_LAYER + "+gzip", "digest": B, "size": 3}],
    }
    return json.dumps(document | changes).encode()


def layer(**changes: Any) -> dict[str, Any]:
    return {"mediaType": oci.OCI_LAYER, "digest": B, "size": 3} | changes


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"{", "manifest"),
        (b"\xff\xfe", "manifest"),
        (b"[]", "manifest"),
        (manifest(layers=[]), "no layers"),
        (manifest(layers=[layer()] * 128), "128 layers"),
        (manifest(layers=[layer(digest="md5:1")]), "digest"),
        (manifest(layers=[layer(digest="sha256:../../x")]), "digest"),
        (manifest(layers=[layer(digest="sha256:" + "A" * 64)]), "digest"),
        (manifest(layers=[layer(size=-1)]), "negative"),
        (manifest(layers=[layer(mediaType="application/x-foreign")]), "unknown type"),
        (manifest(padding="x" * (5 << 20)), "bytes long"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_with_what_is_wrong(data: bytes, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word) as caught:
        oci.parse_manifest("oci-archive:/x.tar", data)

    assert caught.value.reason == "IMAGE_INVALID"
    assert "/x.tar" in caught.value.message


@pytest.mark.parametrize(
    "media_type",
    [
        oci.OCI_LAYER,
        oci.OCI_LAYER + "+gzip",
        oci.OCI_LAYER + "+zstd",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    ],
)
def test_layers_of_known_types_are_taken(media_type: str) -> None:
    parsed = oci.parse_manifest("x", manifest(layers=[layer(mediaType=media_type)]))

    assert parsed.layers[0].media_type == media_type


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"rootfs": {"diff_ids": []}}, "names 0 layers"),
        ({"rootfs": {"diff_ids": ["x"]}}, "digest"),
        ({"rootfs": {"diff_ids": [A]}, "os": "windows"}, "windows"),
        ({"rootfs": {"diff_ids": [A]}, "architecture": "mips"}, "mips"),
        ({"os": "linux"}, "rootfs"),
    ],
)
def test_a_configuration_that_cannot_run_here_is_refused(config: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        oci.parse_config("x", json.dumps(config).encode(), layers=1)


def listed(architecture: str | None, digest: str, *, os: str = "linux") -> oci.Descriptor:
    wanted = None if architecture is None else oci.Platform(architecture=architecture, os=os)
    return oci.Descriptor(digest=digest, size=1, media_type=oci.OCI_MANIFEST, platform=wanted)


def test_the_manifest_of_this_architecture_is_chosen() -> None:
    manifests = (listed("arm64", A), listed("amd64", B, os="windows"), listed("amd64", C))

    assert oci.select_platform("x", manifests, architecture="amd64").digest == C


def test_a_single_manifest_without_a_platform_is_taken() -> None:
    assert oci.select_platform("x", (listed(None, A),), architecture="amd64").digest == A


def test_an_index_without_this_architecture_says_what_it_offers() -> None:
    with pytest.raises(
        InvalidArgument, match=r"no variant for linux/riscv64: it offers linux/amd64, linux/arm64"
    ):
        oci.select_platform("x", (listed("arm64", A), listed("amd64", B)), architecture="riscv64")


def test_chain_ids_follow_the_image_specification() -> None:
    second = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {C}".encode()).hexdigest()

    assert oci.chain_ids((A, B, C)) == (A, second, third)
