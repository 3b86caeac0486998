"""Errors as records: how an operation keeps what it failed of, and gives it back as the same class."""

from hypervisor.core.errors import HypervisorError, from_kind, kind_of
from hypervisor.core.model import ErrorRecord

__all__ = ["copy_of", "error_of", "record_of"]

_MAX_TEXT = 4096


def record_of(error: HypervisorError) -> ErrorRecord:
    """The error as it is stored: class, reason, message, metadata; long texts are cut."""
    return ErrorRecord(
        kind=kind_of(error),
        reason=error.reason,
        message=error.message[:_MAX_TEXT],
        metadata={key: value[:_MAX_TEXT] for key, value in error.metadata.items()},
    )


def error_of(record: ErrorRecord, *, operation_id: str) -> HypervisorError:
    """The error again, with the operation it belongs to in its metadata."""
    metadata = {**record.metadata, "operation_id": operation_id}
    return from_kind(record.kind, record.message, reason=record.reason, metadata=metadata)


def copy_of(error: HypervisorError) -> HypervisorError:
    """An equal error, so that several callers can raise it, each with its own traceback."""
    copy = type(error)(
        error.message,
        reason=error.reason,
        metadata=error.metadata,
        violations=error.violations,
        retry_after_s=error.retry_after_s,
    )
    copy.__cause__ = error
    return copy
