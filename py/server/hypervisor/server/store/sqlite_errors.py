"""SQLite's error codes as errors of ours: what happened to which file, and how to mend it."""

import sqlite3

from hypervisor.core.errors import (
    FailedPrecondition,
    HypervisorError,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from hypervisor.server.store.storage import OutcomeUnknown

__all__ = ["translate"]

_RETRY_AFTER_S = 1.0


def translate(exc: sqlite3.Error, path: str, *, committing: bool = False) -> HypervisorError:
    """The error to raise for ``exc``. Chain it: ``raise translate(exc, path) from exc``.

    ``committing``: it came from the COMMIT itself. An input/output error there leaves open whether the commit
    would be found after a crash; a full disk does not, because the record that ends a transaction did not
    fit.
    """
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    metadata = {"path": path, "sqlite_error": getattr(exc, "sqlite_errorname", type(exc).__name__)}
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(
            f"the disk or the size limit of the store {path} is full: make room or raise store.max_bytes; "
            "nothing was written",
            reason="STORE_DISK_FULL",
            metadata=metadata,
            retry_after_s=_RETRY_AFTER_S,
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return FailedPrecondition(
            f"the store {path} is damaged or not a database ({exc}): restore it from a backup",
            reason="STORE_CORRUPT",
            metadata=metadata,
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return FailedPrecondition(
            f"the store {path} cannot be written ({exc}): check the owner and mode of the file and its directory",
            reason="STORE_READ_ONLY",
            metadata=metadata,
        )
    if code == sqlite3.SQLITE_CANTOPEN:
        return FailedPrecondition(
            f"the store {path} cannot be opened ({exc}): check that its directory exists and is accessible",
            reason="STORE_CANNOT_OPEN",
            metadata=metadata,
        )
    if code == sqlite3.SQLITE_IOERR:
        if committing:
            return OutcomeUnknown(
                f"the disk failed while a commit to {path} was being written ({exc}): read back before a retry",
                metadata=metadata,
            )
        return Unavailable(
            f"the disk of the store {path} failed ({exc}): check the disk and the kernel log",
            reason="STORE_IO_ERROR",
            metadata=metadata,
            retry_after_s=_RETRY_AFTER_S,
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable(
            f"another program has locked the store {path}: end it",
            reason="STORE_BUSY",
            metadata=metadata,
            retry_after_s=_RETRY_AFTER_S,
        )
    return Internal(
        f"unexpected error of the store {path}: {exc}", reason="STORE_INTERNAL", metadata=metadata
    )
