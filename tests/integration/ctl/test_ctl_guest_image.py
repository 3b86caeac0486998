"""The small guest: which modules it loads and in which order, and that it is made whole or refused."""

import gzip
import lzma
from pathlib import Path

import pytest

from hypervisor.ctl.guest_image import build_guest, find_kernel, modules_of
from hypervisor.ctl.kernel_modules import KernelModules, module_name

ELF = b"\x7fELF module "


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A kernel with a few modules, one of them compressed as in Debian 13."""
    directory = tmp_path / "modules" / "6.1.0-1-cloud-amd64"
    directory.mkdir(parents=True)
    dependencies = {
        "virtio.ko": [],
        "virtio_ring.ko": ["virtio.ko"],
        "virtio_pci.ko": ["virtio_ring.ko", "virtio.ko"],
        "virtio_blk.ko": ["virtio_ring.ko", "virtio.ko"],
        "virtio_net.ko.xz": ["virtio_ring.ko", "virtio.ko"],
        "virtio-rng.ko": ["virtio.ko"],
        "unwanted.ko": [],
    }
    (directory / "modules.dep").write_text(
        "".join(f"{file}: {' '.join(needs)}\n" for file, needs in dependencies.items())
    )
    (directory / "modules.builtin").write_text("kernel/drivers/input/evdev.ko\n")
    for file in dependencies:
        data = ELF + file.encode()
        (directory / file).write_bytes(lzma.compress(data) if file.endswith(".xz") else data)
    return directory


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz-6.1.0-1-cloud-amd64"
    path.write_bytes(b"the kernel")
    return path


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    path = tmp_path / "busybox"
    path.write_bytes(b"the busybox")
    return path


def test_modules_are_loaded_after_what_they_need(modules: Path) -> None:
    order = [m.name for m in KernelModules(modules).in_order(["virtio_net", "virtio_rng", "evdev", "absent"])]

    assert order == ["virtio", "virtio_ring", "virtio_net", "virtio_rng"]


def test_modules_that_need_one_another_do_not_hang_it(modules: Path) -> None:
    (modules / "modules.dep").write_text("a.ko: b.ko\nb.ko: a.ko\n")

    assert [m.name for m in KernelModules(modules).in_order(["a"])] == ["b", "a"]


def test_modules_are_unpacked(modules: Path) -> None:
    found = KernelModules(modules)
    (module,) = (m for m in found.in_order(["virtio_net"]) if m.name == "virtio_net")

    assert found.read(module) == ELF + b"virtio_net.ko.xz"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("kernel/a/virtio-rng.ko", "virtio_rng"),
        ("x/virtio_net.ko.xz", "virtio_net"),
        ("e1000.ko.zst", "e1000"),
    ],
)
def test_a_module_is_named_by_its_file(file: str, name: str) -> None:
    assert module_name(file) == name


def test_a_guest_is_a_kernel_and_a_ram_disk_the_same_every_time(
    tmp_path: Path, modules: Path, kernel: Path, busybox: Path
) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        out.mkdir()

    first, second = (build_guest(out, kernel=kernel, modules=modules, busybox=busybox) for out in outs)

    assert first.kernel.read_bytes() == b"the kernel"
    assert first.initrd.read_bytes() == second.initrd.read_bytes()
    assert sorted(path.name for path in outs[0].iterdir()) == ["initrd.img", "vmlinuz"]
    content = gzip.decompress(first.initrd.read_bytes())
    assert b"the busybox" in content
    assert b"virtio\nvirtio_ring\nvirtio_pci\n" in content
    assert b"unwanted" not in content


def test_a_kernel_without_virtio_is_refused_and_leaves_nothing(
    tmp_path: Path, modules: Path, kernel: Path, busybox: Path
) -> None:
    (modules / "modules.dep").write_text("virtio.ko:\n")
    out = tmp_path / "out"
    out.mkdir()

    with pytest.raises(OSError, match="virtio_pci, virtio_blk, virtio_net"):
        build_guest(out, kernel=kernel, modules=modules, busybox=busybox)

    assert list(out.iterdir()) == []


def test_a_module_compressed_in_another_way_is_refused(modules: Path) -> None:
    (modules / "virtio.ko").write_bytes(b"\x28\xb5\x2f\xfd")
    found = KernelModules(modules)

    with pytest.raises(OSError, match="compressed in a way"):
        found.read(found.in_order(["virtio"])[0])


def test_the_newest_cloud_kernel_is_taken(tmp_path: Path) -> None:
    for release in ("6.12.0-1-amd64", "6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"):
        (tmp_path / f"vmlinuz-{release}").touch()

    kernel = find_kernel(tmp_path)

    assert kernel == tmp_path / "vmlinuz-6.1.0-56-cloud-amd64"
    assert modules_of(kernel) == Path("/lib/modules/6.1.0-56-cloud-amd64")


def test_no_kernel_is_none(tmp_path: Path) -> None:
    assert find_kernel(tmp_path) is None
