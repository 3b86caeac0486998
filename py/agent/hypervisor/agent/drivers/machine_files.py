"""Files of the host that a machine's specification names: kernels, initial RAM disks, disk images given by path.

Which files they are is the user's choice, so nothing of a path is believed: it has to lie in one of the configured
directories, once as it is written and once with all symbolic links resolved, and to be an ordinary file. What is
checked is then opened without following a link, and it is the open descriptor that callers go on with where they can:
what the name stands for may change afterwards, what is open does not. A path outside gets the same answer whether
there is something or not.
"""

import asyncio
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from hypervisor.core.errors import InvalidArgument, NotFound
from hypervisor.core.names import shorten

__all__ = ["IMAGE_INVALID", "PATH_NOT_ALLOWED", "MachineFile", "invalid_file", "open_machine_file"]

IMAGE_INVALID = "IMAGE_INVALID"
PATH_NOT_ALLOWED = "PATH_NOT_ALLOWED"

_MAX_PATH_BYTES = 4096
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)


@dataclass(slots=True)
class MachineFile:
    """A checked file, open for reading; close it with ``close`` or ``with``.

    ``field``: the field of the specification that named it. ``path``: where it is, without a symbolic link in it.
    ``fd``: the open file, closed on exec.
    """

    field: str
    path: Path
    fd: int
    size_bytes: int

    def __enter__(self) -> "MachineFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


async def open_machine_file(
    path: str, *, field: str, roots: tuple[Path, ...], follow: bool = True
) -> MachineFile:
    """Open the file at ``path``, which has to lie in one of ``roots``, with symbolic links resolved too.

    ``field`` names the field for errors (``spec.kernel_path``). ``follow=False``: the file itself may not be a link,
    wherever it leads. Raises InvalidArgument (``PATH_NOT_ALLOWED`` outside of the roots, ``IMAGE_INVALID`` for what
    is no file, is empty or cannot be read) and NotFound (``IMAGE_NOT_FOUND``).
    """
    opening = asyncio.ensure_future(asyncio.to_thread(_open, path, field=field, roots=roots, follow=follow))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        # The thread goes on; what it opens would stay open for ever.
        opening.add_done_callback(_close_result)
        raise


def _close_result(opening: "asyncio.Future[MachineFile]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def invalid_file(field: str, problem: str) -> InvalidArgument:
    """The file of ``field`` cannot be used (``IMAGE_INVALID``)."""
    return InvalidArgument.of_field(field, problem, reason=IMAGE_INVALID)


def _open(path: str, *, field: str, roots: tuple[Path, ...], follow: bool) -> MachineFile:
    _check_text(path, field)
    # A root may be a link itself (/lib on Debian): the administrator wrote it, so where it leads is meant.
    resolved_roots = tuple(Path(os.path.realpath(root)) for root in roots)
    if not any(_inside(Path(path), root) for root in (*roots, *resolved_roots)):
        raise _not_allowed(path, field, roots, "is outside the directories")
    directory, name = os.path.split(path)
    real = Path(os.path.realpath(path if follow else directory))
    if not follow:
        real /= name
    root = next((root for root in resolved_roots if _inside(real, root)), None)
    if root is None:
        raise _not_allowed(path, field, roots, "leads by a symbolic link outside the directories")
    try:
        fd = _open_beneath(root, real.relative_to(root).parts, field, path)
    except FileNotFoundError as exc:
        raise NotFound(
            f"{field}: {shorten(path, 200)} does not exist on this node: copy it there first, or mend the path",
            reason="IMAGE_NOT_FOUND",
            metadata={"field": field, "path": path},
        ) from exc
    except OSError as exc:
        raise invalid_file(field, f"{shorten(path, 200)} cannot be opened: {exc.strerror}") from exc
    size = os.fstat(fd).st_size
    if size == 0:
        os.close(fd)
        raise invalid_file(field, f"{shorten(path, 200)} is empty: copy the file to the node again")
    return MachineFile(field, real, fd, size)


def _check_text(path: str, field: str) -> None:
    if not path.startswith("/"):
        problem = f"{shorten(path)} is not an absolute path: begin with '/'"
    elif not path.isprintable():
        problem = f"{shorten(path)} has characters that cannot be printed: write it plainly"
    elif ".." in path.split("/"):
        problem = f"{shorten(path)} has '..' in it: write it without"
    elif len(path.encode(errors="surrogatepass")) > _MAX_PATH_BYTES:
        problem = f"is longer than {_MAX_PATH_BYTES} bytes: give a shorter path"
    else:
        return
    raise invalid_file(field, problem)


def _inside(path: Path, root: Path) -> bool:
    return path != root and path.is_relative_to(root)


def _not_allowed(path: str, field: str, roots: tuple[Path, ...], how: str) -> InvalidArgument:
    allowed = ", ".join(str(root) for root in roots) or "none is configured"
    return InvalidArgument.of_field(
        field,
        f"{shorten(path, 200)} {how} that machines may take files from ({allowed}): move the file there, or add its "
        "directory to machines.roots in the agent's configuration",
        reason=PATH_NOT_ALLOWED,
    )


def _open_beneath(root: Path, parts: tuple[str, ...], field: str, path: str) -> int:
    """Open what ``parts`` lead to without following any link: one put there since the check is refused."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = inner
        # O_PATH first: opening a FIFO or a device for reading could block or act.
        probe = os.open(parts[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            mode = os.fstat(probe).st_mode
            if not stat.S_ISREG(mode):
                what = next((text for test, text in _KINDS if test(mode)), "not a file")
                raise invalid_file(field, f"{shorten(path, 200)} is {what}: give an ordinary file")
            return os.open(f"/proc/self/fd/{probe}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(probe)
    finally:
        os.close(directory)
