"""No file that a linter could read is forgotten: what git tracks is compared with what the lint tests are given.

Runs in the checkout itself (the tags `local` and `external` of its target), since only git knows every file.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SUFFIXES = (".bzl", ".proto", ".py", ".pyi", ".pyx", ".pxd", ".sh")
RUNFILES = Path(os.environ["RUNFILES_DIR"]) / "hypervisor_repo"


@pytest.fixture(scope="module")
def checkout() -> Path:
    return (RUNFILES / "pyproject.toml").resolve().parent


@pytest.fixture(scope="module")
def tracked(checkout: Path) -> list[str]:
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(checkout), "ls-files", "-z"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [name for name in listing.stdout.split("\0") if name and (checkout / name).is_file()]


def _interpreter(path: Path) -> str:
    """Name of the program in the file's first line, "" where it names none."""
    with path.open("rb") as file:
        first = file.readline(64)
    return first.split()[-1].rpartition(b"/")[2].decode() if first.startswith(b"#!") else ""


def test_every_source_file_is_linted(tracked: list[str]) -> None:
    expected = {name for name in tracked if name.endswith(SUFFIXES) or name.endswith("BUILD.bazel")}

    assert sorted(name for name in expected if not (RUNFILES / name).exists()) == []
    assert len(expected) > 10


def test_every_shell_script_is_linted(checkout: Path, tracked: list[str]) -> None:
    expected = {name for name in tracked if _interpreter(checkout / name) in {"sh", "bash", "dash"}}

    assert sorted(name for name in expected if not (RUNFILES / name).exists()) == []
    assert "tools/setup" in expected


def test_every_python_script_is_linted(checkout: Path, tracked: list[str]) -> None:
    expected = {name for name in tracked if _interpreter(checkout / name).startswith("python")}

    assert sorted(name for name in expected if not (RUNFILES / name).exists()) == []
