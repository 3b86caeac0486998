"""What a specification's fields say of images."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.images import (
    ImageKind,
    ImageUser,
    NamedImage,
    image_name_of,
    image_reference,
    is_sha256,
    named_images,
)
from hypervisor.core.states import InstanceType

VM, CONTAINER, MICROVM = InstanceType.VM, InstanceType.CONTAINER, InstanceType.MICROVM


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (ImageUser(CONTAINER, "image:web"), [("image", "web", ImageKind.OCI_ARCHIVE)]),
        (ImageUser(CONTAINER, "web"), []),
        (ImageUser(CONTAINER, "docker.io/library/busybox:1.36"), []),
        (ImageUser(CONTAINER, "oci-archive:/srv/web.tar"), []),
        (ImageUser(VM, "image:debian-12"), [("image", "debian-12", ImageKind.DISK)]),
        (ImageUser(VM, "debian-12"), [("image", "debian-12", ImageKind.DISK)]),
        (ImageUser(MICROVM, "debian-12"), [("image", "debian-12", ImageKind.DISK)]),
        (ImageUser(VM, "/srv/debian.qcow2"), []),
        (ImageUser(VM, "debian.qcow2"), []),
        (
            ImageUser(MICROVM, "", "image:linux", "image:ramdisk"),
            [("kernel_path", "linux", ImageKind.KERNEL), ("initrd_path", "ramdisk", ImageKind.INITRD)],
        ),
        (ImageUser(MICROVM, "", "linux", "/boot/initrd.img"), []),
    ],
)
def test_images_are_named_by_a_prefix_or_for_disks_of_machines_without(
    user: ImageUser, expected: list[tuple[str, str, ImageKind]]
) -> None:
    assert named_images(user) == tuple(NamedImage(*one) for one in expected)


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A", "a_b", "a b", "a\0", "-a", "a-", "x" * 64, "a/b"]
)
def test_what_is_no_name_is_refused_with_its_field(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"spec\.kernel_path"):
        image_name_of(f"image:{name}", "spec.kernel_path")


def test_one_image_has_one_reference() -> None:
    assert image_reference(VM, "debian-12") == image_reference(VM, "image:debian-12") == "image:debian-12"
    assert image_reference(CONTAINER, "busybox") == "busybox"
    assert image_reference(VM, "/srv/debian.qcow2") == "/srv/debian.qcow2"
    assert image_reference(VM, "") == ""


@given(st.text(max_size=80))
def test_only_a_digest_is_a_digest(text: str) -> None:
    assert is_sha256(text) == (len(text) == 64 and set(text) <= set("0123456789abcdef"))


@pytest.mark.parametrize(
    "text", ["0" * 64 + "\n", "A" * 64, "../" + "0" * 61, "0" * 63, "\N{ARABIC-INDIC DIGIT ZERO}" * 64]
)
def test_what_looks_like_a_digest_and_is_none_never_becomes_a_path(text: str) -> None:
    assert not is_sha256(text)
