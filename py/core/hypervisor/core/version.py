"""The version of the running program."""

from pathlib import Path

__all__ = ["program_version"]


def program_version() -> str:
    """As the release says in its file VERSION (``<release>/lib/hypervisor/core/version.py`` is this one); a build
    that is no release says ``dev``."""
    path = Path(__file__).resolve().parents[3] / "VERSION"
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return "dev"
