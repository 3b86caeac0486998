"""Mount points are found whatever the directory is called: what is mounted must never be deleted."""

import os
from pathlib import Path

from hypervisor.ctl.dev.mounts import Mount, mounts_below, parse_mounts, read_mounts

MOUNTINFO = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 21 0:40 / /srv/böxes/a\\040b/rootfs rw - overlay overlay rw,lowerdir=/x
41 40 0:41 / /srv/böxes/a\\040b/rootfs/back\\134slash rw,nosuid master:3 - tmpfs none rw
42 21 0:42 / /srv/böxes-other rw - tmpfs none rw
""".encode()


def test_escapes_and_letters_beyond_ascii_are_read() -> None:
    assert parse_mounts(MOUNTINFO) == [
        Mount(Path("/"), "ext4"),
        Mount(Path("/srv/böxes/a b/rootfs"), "overlay"),
        Mount(Path("/srv/böxes/a b/rootfs/back\\slash"), "tmpfs"),
        Mount(Path("/srv/böxes-other"), "tmpfs"),
    ]


def test_names_in_another_encoding_are_kept_as_bytes() -> None:
    (mount,) = parse_mounts(b"40 21 0:40 / /srv/b\xf6x rw - tmpfs none rw\n")

    assert os.fsencode(mount.point) == b"/srv/b\xf6x"


def test_mounts_below_a_directory_come_deepest_first_and_neighbours_not_at_all() -> None:
    assert mounts_below(Path("/srv/böxes"), parse_mounts(MOUNTINFO)) == [
        Path("/srv/böxes/a b/rootfs/back\\slash"),
        Path("/srv/böxes/a b/rootfs"),
    ]


def test_links_on_the_way_to_the_directory_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    found = mounts_below(tmp_path / "link", [Mount((tmp_path / "real" / "m").resolve(), "tmpfs")])

    assert found == [(tmp_path / "real" / "m").resolve()]


def test_this_machines_mounts_are_read() -> None:
    assert Path("/proc") in {mount.point for mount in read_mounts()}
