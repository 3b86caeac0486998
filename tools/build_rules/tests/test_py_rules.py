"""What py_test promises: set variables, files by absolute path, isolation from the host, child processes alike."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_env_is_set_as_written() -> None:
    assert os.environ["RULES_TEST_VALUE"] == "a 'quoted' value"


def test_path_env_names_an_existing_file() -> None:
    path = Path(os.environ["RULES_TEST_FILE"])

    assert path.is_absolute()
    assert path.read_text().strip()


def test_no_site_packages_of_the_host_are_importable() -> None:
    assert not [path for path in sys.path if path.endswith(("/site-packages", "/dist-packages"))]


@pytest.mark.parametrize("package", ["grpc", "aiohttp", "hypervisor"])
def test_what_is_not_declared_cannot_be_imported(package: str) -> None:
    assert importlib.util.find_spec(package) is None


def test_a_child_process_imports_what_its_parent_can() -> None:
    code = "import pytest; print(pytest.__file__)"

    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    assert child.stdout.strip() == pytest.__file__


def test_packages_bring_byte_code_that_needs_no_check() -> None:
    spec = importlib.util.find_spec("pytest")
    assert spec is not None
    assert spec.cached is not None

    assert Path(spec.cached).read_bytes()[4:8] == (1).to_bytes(4, "little")
