"""The tarball writer: merging of import roots, determinism, byte code, version."""

from __future__ import annotations

import importlib.util
import os
import tarfile
from pathlib import Path

import make_release
import pytest


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "src" / "greet.py"
    path.parent.mkdir()
    path.write_text("def main():\n    return 0\n")
    return path


def build(tmp_path: Path, name: str, module: Path, *extra: str) -> Path:
    version = tmp_path / "VERSION"
    version.write_text("1.2.3\n")
    out = tmp_path / name
    make_release.main(
        [
            f"--out={out}",
            "--prefix=thing",
            "--workspace=repo",
            f"--version-file={version}",
            "--program=greet=greet",
            "--root=repo/src",
            *extra,
            f"src/greet.py={module}",
        ]
    )
    return out


def test_roots_are_merged_into_one_library() -> None:
    members = make_release.library_members(
        ["py/a/hypervisor/a.py=/x/a.py", "../pypi_b/site/b/__init__.py=/y/b.py"],
        ["repo/py/a", "pypi_b/site"],
        workspace="repo",
    )

    assert members == {"lib/hypervisor/a.py": Path("/x/a.py"), "lib/b/__init__.py": Path("/y/b.py")}


def test_the_innermost_root_of_a_file_counts() -> None:
    members = make_release.library_members(
        ["proto/stubs/api/a.py=/x/a.py"], ["repo/proto", "repo/proto/stubs"], workspace="repo"
    )

    assert list(members) == ["lib/api/a.py"]


def test_two_packages_that_own_a_file_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("2")

    with pytest.raises(SystemExit, match=r"two packages own lib/same\.py"):
        make_release.library_members(
            [f"a/same.py={tmp_path}/one", f"b/same.py={tmp_path}/two"], ["repo/a", "repo/b"], workspace="repo"
        )


@pytest.mark.parametrize("name", ["a.pyi", "a.pyx", "a.proto", "a.c", "py.typed"])
def test_what_is_needed_only_to_build_is_left_out(name: str) -> None:
    assert make_release.library_members([f"src/{name}=/x/{name}"], ["repo/src"], workspace="repo") == {}


def test_the_same_inputs_give_the_same_bytes_whatever_their_times(tmp_path: Path, module: Path) -> None:
    first = build(tmp_path, "first.tar.gz", module)
    os.utime(module, (1, 1))
    second = build(tmp_path, "second.tar.gz", module)

    assert first.read_bytes() == second.read_bytes()


def test_members_have_no_owner_and_no_time(tmp_path: Path, module: Path) -> None:
    with tarfile.open(build(tmp_path, "out.tar.gz", module)) as tar:
        infos = tar.getmembers()

    assert {(info.mtime, info.uid, info.gid, info.uname) for info in infos} == {(0, 0, 0, "")}
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    assert next(info.mode for info in infos if info.name == "thing/bin/greet") == 0o755


def test_byte_code_is_used_without_a_look_at_the_source(tmp_path: Path, module: Path) -> None:
    with tarfile.open(build(tmp_path, "out.tar.gz", module)) as tar:
        member = tar.extractfile("thing/" + make_release.byte_code_name("lib/greet.py"))
        assert member is not None
        code = member.read()

    assert code[:4] == importlib.util.MAGIC_NUMBER
    assert int.from_bytes(code[4:8], "little") == 0b01  # hash-based, not checked


def test_an_unstamped_release_names_the_version_alone(tmp_path: Path, module: Path) -> None:
    with tarfile.open(build(tmp_path, "out.tar.gz", module)) as tar:
        member = tar.extractfile("thing/VERSION")
        assert member is not None
        assert member.read() == b"1.2.3\n"


def test_a_stamped_release_names_the_commit(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("1.2.3\n")
    (tmp_path / "status").write_text("BUILD_HOST x\nSTABLE_COMMIT 0123456789ab-dirty\n")

    assert (
        make_release.stamped_version(tmp_path / "VERSION", tmp_path / "status") == "1.2.3+0123456789ab.dirty"
    )


def test_extra_files_go_where_they_are_told(tmp_path: Path, module: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("server: {}\n")

    with tarfile.open(build(tmp_path, "out.tar.gz", module, f"--extra=etc/server.yaml={config}")) as tar:
        assert "thing/etc/server.yaml" in tar.getnames()
