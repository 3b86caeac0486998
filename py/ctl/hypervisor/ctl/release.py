"""Where the files of a release are, seen from this module: ``PREFIX/lib/hypervisor/ctl/release.py``."""

from pathlib import Path

__all__ = ["own_version", "release_directory"]


def release_directory() -> Path | None:
    """PREFIX of the unpacked release this program runs from; None in a checkout."""
    prefix = Path(__file__).resolve().parents[3]
    return (
        prefix if (prefix / "VERSION").is_file() and (prefix / "bin" / "hypervisor-ctl").is_file() else None
    )


def own_version() -> str:
    """The version of the release, or ``dev`` in a checkout."""
    prefix = release_directory()
    return "dev" if prefix is None else (prefix / "VERSION").read_text(encoding="utf-8").strip()
