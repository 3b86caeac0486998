"""What drivers make of a field that may name an image."""

from pathlib import Path

import pytest

from hypervisor.agent.drivers.driver import Assignment, LocalImage
from hypervisor.agent.drivers.local_images import local_image, located
from hypervisor.core.errors import NotFound
from hypervisor.core.images import ImageKind
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType

ROOTS = (Path("/srv/images"),)
LINUX = LocalImage(
    path="/var/cache/i-1/abc", kind=ImageKind.KERNEL, format="bzimage", size_bytes=1, sha256="abc"
)


def machine(**spec: str) -> Assignment:
    return Assignment(
        instance_id="i-1",
        name="vm",
        project="default",
        type=InstanceType.VM,
        spec=InstanceSpec(**spec),  # type: ignore[arg-type]
        images={"linux": LINUX},
    )


def test_an_image_is_its_file_in_the_cache_and_needs_no_configured_directory() -> None:
    assignment = machine(kernel_path="image:linux")

    assert local_image(assignment, "kernel_path") == LINUX
    assert located(assignment, "kernel_path", roots=ROOTS) == (
        "/var/cache/i-1/abc",
        (Path("/var/cache/i-1"),),
    )


def test_a_path_stays_what_it_is() -> None:
    assignment = machine(kernel_path="/boot/vmlinuz")

    assert local_image(assignment, "kernel_path") is None
    assert located(assignment, "kernel_path", roots=ROOTS) == ("/boot/vmlinuz", ROOTS)


def test_a_disk_may_be_named_without_prefix() -> None:
    assert local_image(machine(image="linux"), "image") == LINUX


def test_an_image_that_was_not_handed_over_is_named_with_its_field() -> None:
    with pytest.raises(NotFound, match=r"spec\.image: image debian-12"):
        local_image(machine(image="debian-12"), "image")
