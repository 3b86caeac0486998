"""The limits of the Storage contract, checked before anything is sent: every backend refuses the same."""

from collections.abc import Sequence

from hypervisor.core.errors import InvalidArgument, NotFound, Unavailable
from hypervisor.server.store.storage import (
    MAX_COMMIT_BYTES,
    MAX_KEY_BYTES,
    MAX_LIST_LIMIT,
    MAX_OPERATIONS,
    MAX_VALUE_BYTES,
    Compare,
    Operation,
    Put,
)

__all__ = [
    "check_commit",
    "check_key",
    "check_list",
    "check_prefix",
    "check_ttl",
    "lease_not_found",
    "prefix_end",
    "store_closed",
]

_ENTRY_OVERHEAD_BYTES = 64
_MAX_TTL_S = 365 * 24 * 3600.0


def _encoded_length(field: str, text: str) -> int:
    """Length in UTF-8; lone surrogates (which have none) and NUL are refused."""
    try:
        encoded = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidArgument.of_field(field, "is not valid Unicode", reason="KEY_INVALID") from None
    if "\0" in text:
        raise InvalidArgument.of_field(field, "contains a NUL character; remove it", reason="KEY_INVALID")
    if encoded > MAX_KEY_BYTES:
        raise InvalidArgument.of_field(
            field, f"has {encoded} bytes; shorten it to {MAX_KEY_BYTES} or fewer", reason="KEY_INVALID"
        )
    return encoded


def check_key(key: str, *, field: str = "key") -> int:
    """Raise ``InvalidArgument`` (``KEY_INVALID``) unless ``key`` is legal; returns its length in bytes."""
    if not key.startswith("/"):
        raise InvalidArgument.of_field(field, f"{key[:64]!r} must begin with '/'", reason="KEY_INVALID")
    return _encoded_length(field, key)


def check_prefix(prefix: str) -> None:
    """Raise ``InvalidArgument`` unless ``prefix`` is empty or can begin a legal key."""
    if prefix:
        check_key(prefix, field="prefix")


def check_list(prefix: str, *, start_key: str, limit: int, revision: int | None) -> None:
    """Refuse illegal arguments of ``Storage.list``."""
    check_prefix(prefix)
    if start_key:
        check_key(start_key, field="start_key")
        if not start_key.startswith(prefix):
            raise InvalidArgument.of_field("start_key", f"must begin with the prefix {prefix!r}")
    if not 1 <= limit <= MAX_LIST_LIMIT:
        raise InvalidArgument.of_field("limit", f"is {limit}; it must be from 1 to {MAX_LIST_LIMIT}")
    if revision is not None and revision < 0:
        raise InvalidArgument.of_field("revision", f"is {revision}; it must not be negative")


def check_ttl(ttl_s: float) -> None:
    """Refuse time-to-lives outside 1 second .. 1 year."""
    if not 1.0 <= ttl_s <= _MAX_TTL_S:
        raise InvalidArgument.of_field("ttl_s", f"is {ttl_s}; it must be from 1 to {_MAX_TTL_S:.0f} seconds")


def check_commit(compares: Sequence[Compare], operations: Sequence[Operation]) -> None:
    """Refuse commits outside the limits: count, key, value and total size, one operation per key."""
    for field, entries in (("compares", compares), ("operations", operations)):
        if len(entries) > MAX_OPERATIONS:
            raise InvalidArgument.of_field(
                field,
                f"has {len(entries)} entries; split the commit into parts of {MAX_OPERATIONS} or fewer",
                reason="TOO_MANY_OPERATIONS",
            )
    total = 0
    for index, compare in enumerate(compares):
        total += 2 * check_key(compare.key, field=f"compares[{index}].key") + _ENTRY_OVERHEAD_BYTES
        if compare.mod_revision < 0:
            raise InvalidArgument.of_field(
                f"compares[{index}].mod_revision", f"is {compare.mod_revision}; it must not be negative"
            )
    seen: set[str] = set()
    for index, operation in enumerate(operations):
        total += check_key(operation.key, field=f"operations[{index}].key") + _ENTRY_OVERHEAD_BYTES
        if operation.key in seen:
            raise InvalidArgument.of_field(
                f"operations[{index}].key",
                f"{operation.key!r} appears twice; one commit changes a key once",
                reason="DUPLICATE_KEY",
            )
        seen.add(operation.key)
        if isinstance(operation, Put):
            size = len(operation.value)
            if size > MAX_VALUE_BYTES:
                raise InvalidArgument.of_field(
                    f"operations[{index}].value",
                    f"of {operation.key!r} has {size} bytes; the store takes at most {MAX_VALUE_BYTES}",
                    reason="VALUE_TOO_LARGE",
                )
            total += size
    if total > MAX_COMMIT_BYTES:
        raise InvalidArgument.of_field(
            "operations",
            f"have {total} bytes together; split the commit into parts of {MAX_COMMIT_BYTES} or fewer",
            reason="COMMIT_TOO_LARGE",
        )


def prefix_end(prefix: str) -> bytes:
    """The first key after all keys that begin with ``prefix``, as UTF-8 bytes.

    For the empty prefix that is ``0``, the byte after the ``/`` with which all keys begin.
    """
    # Legal UTF-8 has no byte 0xff, so raising the last byte never carries.
    encoded = (prefix or "/").encode()
    return encoded[:-1] + bytes([encoded[-1] + 1])


def lease_not_found(lease_id: str) -> NotFound:
    """The error of every backend for a lease that has ended (or never was)."""
    return NotFound(
        f"lease {lease_id!r} has ended; grant a new one",
        reason="LEASE_NOT_FOUND",
        metadata={"lease_id": lease_id},
    )


def store_closed() -> Unavailable:
    """The error of every call after ``aclose``."""
    return Unavailable("the store was closed: this server is shutting down", reason="STORE_CLOSED")
