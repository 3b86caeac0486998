"""The release tarball, unpacked and run away from Bazel and the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = ("hypervisor-agent", "hypervisor-ctl", "hypervisor-server")
NOT_AT_RUN_TIME = (
    "Cython",
    "_pytest",
    "grpc_tools",
    "hypothesis",
    "mypy",
    "mypyc",
    "pytest",
    "ruff",
    "setuptools",
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("release")
    # By tar: Debian 12's tarfile (3.11.2) has no extraction filters yet.
    command = ["tar", "-xzf", os.environ["HYPERVISOR_RELEASE"], "-C", str(directory)]
    subprocess.run(command, check=True, timeout=120)
    return directory / "hypervisor"


def run(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run with nothing of this process's environment: the release needs none of it."""
    return subprocess.run(
        [str(word) for word in command],
        env={"PATH": "/usr/bin:/bin", **environ},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_starts_in_an_empty_environment(release: Path, program: str) -> None:
    result = run(release / "bin" / program, "--help")

    assert result.returncode == 0, result.stderr
    assert "sage" in result.stdout


def test_a_program_starts_through_a_link(release: Path, tmp_path: Path) -> None:
    link = tmp_path / "ctl"
    link.symlink_to(release / "bin" / "hypervisor-ctl")

    assert run(link, "--help").returncode == 0


def test_modules_of_the_environment_are_not_imported(release: Path, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('click of the environment')")

    result = run(release / "bin" / "hypervisor-ctl", "--help", PYTHONPATH=str(tmp_path), PYTHONSTARTUP="x")

    assert result.returncode == 0, result.stderr


def test_nothing_is_written_into_the_release_by_running_it(release: Path) -> None:
    before = sorted(release.rglob("*"))

    for program in PROGRAMS:
        assert run(release / "bin" / program, "--help").returncode == 0

    assert sorted(release.rglob("*")) == before


def test_another_interpreter_is_refused_by_name(release: Path, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(
        "#!/bin/sh\n"
        "# A 3.12 for whoever asks: runs the launcher's first lines with another version number.\n"
        'code="import sys; sys.version_info = (3, 12, 0)\n$4"\n'
        f'shift 4; exec {sys.executable} -I -S -c "$code" "$@"\n'
    )
    other.chmod(0o755)

    result = run(release / "bin" / "hypervisor-ctl", "--help", HYPERVISOR_PYTHON=str(other))

    assert result.returncode == 1
    assert "needs CPython 3.11" in result.stderr
    assert "HYPERVISOR_PYTHON" in result.stderr


def test_only_what_runs_is_in_it(release: Path) -> None:
    library = {path.name for path in (release / "lib").iterdir()}

    assert library.isdisjoint(NOT_AT_RUN_TIME)
    assert {"grpc", "google", "hypervisor", "uvloop"} <= library


def test_our_packages_stay_namespaces(release: Path) -> None:
    namespaces = [release / "lib" / "hypervisor", release / "lib" / "hypervisor" / "agent"]

    assert [path for path in namespaces if (path / "__init__.py").exists()] == []


def test_every_module_of_ours_has_byte_code(release: Path) -> None:
    sources = list((release / "lib" / "hypervisor").rglob("*.py"))
    missing = [s for s in sources if not (s.parent / "__pycache__" / f"{s.stem}.cpython-311.pyc").exists()]

    assert len(sources) > 20
    assert missing == []


@pytest.mark.parametrize(
    "name", ["LICENSE", "VERSION", "etc/agent.yaml", "etc/server.yaml", "systemd/hypervisor-server.service"]
)
def test_what_an_operator_needs_is_in_it(release: Path, name: str) -> None:
    assert (release / name).read_text().strip()
