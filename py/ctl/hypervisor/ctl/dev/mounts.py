"""What is mounted where, out of /proc/self/mountinfo."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mount", "mounts_below", "parse_mounts", "read_mounts"]


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount: where, and what kind of file system."""

    point: Path
    kind: str


def parse_mounts(text: bytes) -> list[Mount]:
    """The mounts of a mountinfo, in its order: later ones lie over earlier ones at the same point."""
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(b" - ")
        # Blanks and backslashes are written as octal escapes; all other bytes as they are, in whatever encoding.
        point = before.split(b" ")[4].decode("unicode_escape").encode("latin-1")
        found.append(Mount(Path(point.decode("utf-8", "surrogateescape")), after.split()[0].decode("ascii")))
    return found


def read_mounts() -> list[Mount]:
    """All mounts that this process sees."""
    return parse_mounts(Path("/proc/self/mountinfo").read_bytes())


def mounts_below(directory: Path, mounts: list[Mount] | None = None) -> list[Path]:
    """Mount points below the directory (of ``mounts``, or of now), the deepest first. Symbolic links on the way to it
    are followed: the kernel names mount points without any."""
    real = directory.resolve()
    points = [
        mount.point
        for mount in (read_mounts() if mounts is None else mounts)
        if mount.point != real and mount.point.is_relative_to(real)
    ]
    return sorted(points, key=lambda point: len(point.parts), reverse=True)
