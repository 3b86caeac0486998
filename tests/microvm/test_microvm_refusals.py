"""Specifications that no microVM can be: refused with the field named, and nothing is left of them."""

import gzip
import os
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from hvtest_microvms import FirecrackerBench, assignment
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.core.errors import AlreadyExists, HypervisorError, InvalidArgument, NotFound
from hypervisor.core.machines import CloudInit, MicrovmOptions, NetworkInterface, VmOptions
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType

Change = Callable[[InstanceSpec, FirecrackerBench], InstanceSpec]

HOSTILE = (
    "$(touch /tmp/x)",
    "a'b",
    'a"b',
    "a\nb",
    "a\0b",
    "</kernel>",
    "../../etc/shadow",
    "%s%n",
    "é",
    ";reboot",
)


def path_of(field: str, text: str) -> Change:
    return lambda spec, node: replace(spec, **{field: f"{node.images}/{text}"})


def of(**changes: object) -> Change:
    return lambda spec, node: replace(spec, **changes)


def linked(spec: InstanceSpec, node: FirecrackerBench) -> InstanceSpec:
    link = node.images / "link"
    link.symlink_to("/etc/shadow")
    return replace(spec, image=str(link))


def fifo(spec: InstanceSpec, node: FirecrackerBench) -> InstanceSpec:
    os.mkfifo(node.images / "fifo")
    return replace(spec, initrd_path=str(node.images / "fifo"))


def compressed(spec: InstanceSpec, node: FirecrackerBench) -> InstanceSpec:
    (node.images / "disk.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    return replace(spec, image=str(node.images / "disk.gz"))


def backed(spec: InstanceSpec, node: FirecrackerBench) -> InstanceSpec:
    header = b"QFI\xfb" + (3).to_bytes(4, "big") + (512).to_bytes(8, "big") + (11).to_bytes(4, "big")
    (node.images / "backed.qcow2").write_bytes(header + bytes(480) + b"/etc/shadow" + bytes(1024))
    return replace(spec, image=str(node.images / "backed.qcow2"))


def bzimage(spec: InstanceSpec, node: FirecrackerBench) -> InstanceSpec:
    (node.images / "vmlinuz").write_bytes(bytes(0x202) + b"HdrS" + bytes(1024))
    return replace(spec, kernel_path=str(node.images / "vmlinuz"))


def too_large(spec: InstanceSpec, node: FirecrackerBench) -> InstanceSpec:
    with (node.images / "large.raw").open("wb") as file:
        file.truncate(2 << 30)
    return replace(spec, image=str(node.images / "large.raw"), disk_gb=1)


REFUSED: list[tuple[str, str, Change]] = [
    *((f"kernel_path {text!r}", "spec.kernel_path", path_of("kernel_path", text)) for text in HOSTILE),
    *((f"initrd_path {text!r}", "spec.initrd_path", path_of("initrd_path", text)) for text in HOSTILE),
    *((f"image {text!r}", "spec.image", path_of("image", text)) for text in HOSTILE),
    ("kernel outside of the roots", "spec.kernel_path", of(kernel_path="/boot/vmlinuz")),
    ("shadow as image", "spec.image", of(image="/etc/shadow")),
    ("a link as image", "spec.image", linked),
    ("a FIFO as initrd", "spec.initrd_path", fifo),
    ("a compressed disk", "spec.image", compressed),
    ("a qcow2 with a backing file", "spec.image", backed),
    ("a compressed kernel", "spec.kernel_path", bzimage),
    ("an image larger than the disk", "spec.disk_gb", too_large),
    ("a newline in the arguments", "spec.kernel_args", of(kernel_args="a\nb")),
    ("NUL in the arguments", "spec.kernel_args", of(kernel_args="a\0b")),
    ("too many arguments", "spec.kernel_args", of(kernel_args="x" * 1900)),
    ("a command", "spec.command", of(command=("sh",))),
    ("variables", "spec.env", of(env={"A": "b"})),
    ("cloud-init", "spec.cloud_init", of(cloud_init=CloudInit(hostname="a"))),
    ("options of VMs", "spec.vm", of(vm=VmOptions())),
    ("too little memory", "spec.memory_mb", of(memory_mb=4)),
    ("no memory", "spec.memory_mb", of(memory_mb=0)),
    ("too many processors", "spec.cpu_cores", of(cpu_millis=33_000)),
    (
        "a bridge that is not allowed",
        "spec.networks[0].bridge",
        of(networks=(NetworkInterface(bridge="br0"),)),
    ),
    ("metadata without a card", "spec.microvm.metadata", of(microvm=MicrovmOptions(metadata="{}"))),
]


@pytest.mark.parametrize(
    ("field", "change"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED]
)
async def test_what_cannot_be_is_refused_by_its_field_and_leaves_nothing(
    node: FirecrackerBench, micro: MicrovmDriver, field: str, change: Change
) -> None:
    with pytest.raises((InvalidArgument, NotFound)) as caught:
        await micro.create(assignment(change(node.shell(), node)))

    assert caught.value.metadata["field"] == field
    assert await micro.list() == ()
    assert node.leftovers() == {}


@pytest.mark.parametrize("instance_id", ["", "..", "a/b", "../x", "A", "a" * 64, "a b", "-a", "a\0"])
async def test_an_id_that_is_no_name_is_refused(
    node: FirecrackerBench, micro: MicrovmDriver, instance_id: str
) -> None:
    made = replace(assignment(node.shell()), instance_id=instance_id)

    with pytest.raises(InvalidArgument) as caught:
        await micro.create(made)

    assert caught.value.metadata["field"] == "id"
    assert await micro.delete(instance_id) is False


async def test_every_wrong_field_is_told_at_once(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    spec = replace(node.shell(), kernel_args="\n", command=("sh",), memory_mb=-1)

    with pytest.raises(InvalidArgument) as caught:
        await micro.create(assignment(spec))

    assert {violation.field for violation in caught.value.violations} == {
        "spec.kernel_args",
        "spec.command",
        "spec.memory_mb",
    }


async def test_another_type_is_refused(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await micro.create(replace(assignment(node.shell()), type=InstanceType.CONTAINER))

    assert caught.value.metadata["field"] == "type"


async def test_a_create_with_other_files_under_the_same_id_is_refused(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    made = assignment(node.shell())
    await micro.create(made)

    with pytest.raises(AlreadyExists):
        await micro.create(replace(made, spec=node.spec(disk_gb=1)))


async def test_no_kernel_at_all_is_told_with_the_key_of_the_default(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    with pytest.raises(InvalidArgument, match=r"machines\.kernel"):
        await micro.create(assignment(replace(node.shell(), kernel_path="")))


async def test_a_record_that_somebody_damaged_hides_nobody_else_and_can_be_deleted(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    bad, good = assignment(node.shell()), assignment(node.shell())
    for each in (bad, good):
        await micro.create(each)
    await micro.aclose()
    path = node.config.data_dir / "instances" / bad.instance_id / "instance.json"
    path.write_bytes(b'{"instance_id": 7')

    other = node.driver()
    try:
        assert [seen.instance_id for seen in await other.list()] == [good.instance_id]
        assert await other.recover(bad.instance_id, {}) is None
        assert await other.delete(bad.instance_id)
        assert await other.delete(good.instance_id)
    finally:
        await other.aclose()


async def test_a_data_directory_that_cannot_be_written_is_told(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    node.config.data_dir.mkdir()
    (node.config.data_dir / "instances").write_text("a file")

    try:
        with pytest.raises(HypervisorError) as caught:
            await micro.create(assignment(node.shell()))
    finally:
        (node.config.data_dir / "instances").unlink()

    assert str(node.config.data_dir) in caught.value.message
