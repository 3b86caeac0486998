"""pytest as Bazel runs a test: files in, exit code and junit XML out.

The rule py_test passes the test modules (paths below the runfiles directory) first; everything after them goes to
pytest as it is. Understood of Bazel's test protocol: XML_OUTPUT_FILE, TESTBRIDGE_TEST_ONLY (--test_filter), TEST_TMPDIR
and sharding. No test found is a failure, except in a shard whose siblings got them all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

__all__ = ["ShardPlugin", "main", "split_arguments"]


class ShardPlugin:
    """Keep every `total`-th collected test, from the `index`-th on: the same split in every process."""

    def __init__(self, index: int, total: int) -> None:
        if not 0 <= index < total:
            raise ValueError(f"shard index {index} is not in 0..{total - 1}")
        self._index = index
        self._total = total
        self.emptied = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        mine = items[self._index :: self._total]
        others = [item for position, item in enumerate(items) if position % self._total != self._index]
        self.emptied = bool(items) and not mine
        if others:
            config.hook.pytest_deselected(items=others)
        items[:] = mine


def split_arguments(arguments: list[str], runfiles: Path) -> tuple[list[str], list[str]]:
    """Split the command line into absolute paths of test modules and arguments for pytest."""
    count = 0
    while (
        count < len(arguments) and arguments[count].endswith(".py") and not arguments[count].startswith("-")
    ):
        count += 1
    return [str(runfiles / path) for path in arguments[:count]], arguments[count:]


def main(arguments: list[str], environ: dict[str, str]) -> int:
    """Run pytest and return the exit code for Bazel."""
    runfiles = Path(environ["RUNFILES_DIR"])
    workspace = runfiles / environ.get("TEST_WORKSPACE", "hypervisor_repo")
    modules, extra = split_arguments(arguments, runfiles)
    options = [
        "-p",
        "no:cacheprovider",
        "-ra",
        f"--rootdir={workspace}",
        f"--config-file={workspace}/pyproject.toml",
    ]
    if xml := environ.get("XML_OUTPUT_FILE"):
        options.append(f"--junitxml={xml}")
    if expression := environ.get("TESTBRIDGE_TEST_ONLY"):
        options += ["-k", expression]
    if temporary := environ.get("TEST_TMPDIR"):
        options.append(f"--basetemp={temporary}/pytest")
    plugins: list[object] = []
    shard = None
    if (total := int(environ.get("TEST_TOTAL_SHARDS") or 1)) > 1:
        shard = ShardPlugin(int(environ["TEST_SHARD_INDEX"]), total)
        plugins.append(shard)
    if status_file := environ.get("TEST_SHARD_STATUS_FILE"):
        Path(status_file).touch()  # tells Bazel that sharding is understood
    # How long an example takes is a matter of what else the machine does.
    settings.register_profile("bazel", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("bazel")
    code = int(pytest.main([*options, *extra, *modules], plugins=plugins))
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and shard is not None and shard.emptied:
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
