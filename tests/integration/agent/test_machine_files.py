"""Files of the host that a specification names: which may be opened, and what every other one is answered."""

import os
import stat
from pathlib import Path

import pytest

from hypervisor.agent.drivers.machine_files import open_machine_file
from hypervisor.core.errors import InvalidArgument, NotFound

FIELD = "spec.kernel_path"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    (root / "kernel").write_bytes(b"a kernel")
    (tmp_path / "secret").write_bytes(b"not yours")
    return root


async def refused(path: Path | str, root: Path, *, follow: bool = True) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        await open_machine_file(str(path), field=FIELD, roots=(root,), follow=follow)
    assert [violation.field for violation in caught.value.violations] == [FIELD]
    return caught.value


async def test_a_file_in_a_root_is_opened(root: Path) -> None:
    with await open_machine_file(str(root / "kernel"), field=FIELD, roots=(root,)) as file:
        assert os.read(file.fd, 100) == b"a kernel"
        assert (file.path, file.size_bytes, file.field) == (root / "kernel", 8, FIELD)
        assert not os.get_inheritable(file.fd)


async def test_closing_twice_closes_once(root: Path) -> None:
    file = await open_machine_file(str(root / "kernel"), field=FIELD, roots=(root,))
    fd = file.fd

    file.close()
    file.close()

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_a_link_inside_the_roots_leads_to_its_file(root: Path) -> None:
    (root / "current").symlink_to("kernel")

    with await open_machine_file(str(root / "current"), field=FIELD, roots=(root,)) as file:
        assert file.path == root / "kernel"


async def test_a_link_is_refused_where_links_are_not_wanted(root: Path) -> None:
    (root / "current").symlink_to("kernel")

    error = await refused(root / "current", root, follow=False)

    assert error.reason == "IMAGE_INVALID"
    assert "symbolic link" in error.message


async def test_a_root_may_be_reached_by_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)

    with await open_machine_file(str(link / "kernel"), field=FIELD, roots=(link,), follow=False) as file:
        assert file.path == root / "kernel"


@pytest.mark.parametrize(
    "target", ["../secret", "{tmp}/secret", "/etc/shadow", "/nowhere", "self", "/proc/self/mem"]
)
async def test_a_link_that_leads_outside_is_refused_whatever_is_there(root: Path, target: str) -> None:
    (root / "self").symlink_to("self")
    (root / "link").symlink_to(target.format(tmp=root.parent))

    error = await refused(root / "link", root)

    assert error.reason in ("PATH_NOT_ALLOWED", "IMAGE_INVALID")


async def test_a_directory_that_is_a_link_outside_is_refused(root: Path) -> None:
    (root / "dir").symlink_to("..")

    error = await refused(root / "dir" / "secret", root, follow=False)

    assert error.reason == "PATH_NOT_ALLOWED"


async def test_a_path_outside_is_answered_the_same_whether_it_is_there_or_not(root: Path) -> None:
    there, absent = [await refused(root.parent / name, root) for name in ("secret", "absent")]

    assert there.reason == absent.reason == "PATH_NOT_ALLOWED"
    assert there.message.replace("secret", "absent") == absent.message
    assert "machines.roots" in there.message


async def test_a_root_whose_name_begins_the_same_is_outside(root: Path) -> None:
    other = root.parent / "images-other"
    other.mkdir()
    (other / "kernel").write_bytes(b"x")

    assert (await refused(other / "kernel", root)).reason == "PATH_NOT_ALLOWED"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "kernel",
        "{root}/../secret",
        "{root}/x/../kernel",
        "{root}/ker\0nel",
        "{root}/ker\nnel",
        "{root}/" + "x" * 5000,
    ],
)
async def test_a_path_that_is_not_written_plainly_is_refused(root: Path, path: str) -> None:
    error = await refused(path.format(root=root), root)

    assert error.reason == "IMAGE_INVALID"
    assert len(error.message) < 500


async def test_the_root_itself_is_no_file(root: Path) -> None:
    assert (await refused(root, root)).reason == "PATH_NOT_ALLOWED"


async def test_an_absent_file_is_not_found(root: Path) -> None:
    with pytest.raises(NotFound) as caught:
        await open_machine_file(str(root / "absent"), field=FIELD, roots=(root,))

    assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert FIELD in caught.value.message


@pytest.mark.parametrize("kind", ["directory", "FIFO", "socket"])
async def test_what_is_no_ordinary_file_is_refused_by_name(root: Path, kind: str) -> None:
    path = root / "odd"
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)

    error = await refused(path, root)

    assert error.reason == "IMAGE_INVALID"
    assert f"is a {kind}" in error.message


async def test_a_device_is_refused() -> None:
    error = await refused("/dev/zero", Path("/dev"))

    assert "is a character device" in error.message


async def test_an_empty_file_is_refused(root: Path) -> None:
    (root / "empty").touch()

    assert "is empty" in (await refused(root / "empty", root)).message


async def test_without_roots_nothing_is_allowed(root: Path) -> None:
    with pytest.raises(InvalidArgument, match="none is configured"):
        await open_machine_file(str(root / "kernel"), field=FIELD, roots=())
