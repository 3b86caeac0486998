"""``python -m hvsim`` as a process of its own, for tests: what a seed does also depends on how Python orders sets."""

import os
import subprocess
import sys

__all__ = ["hvsim"]


def hvsim(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it to its end."""
    return subprocess.run(
        [sys.executable, "-m", "hvsim", "--jobs", "1", *arguments],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
