"""The one error tree. Code that decides raises these; the edges translate them to gRPC and back.

::

    HypervisorError
    ├── InvalidArgument       the request is wrong, whatever the state of the system
    ├── NotFound              the named object does not exist
    ├── AlreadyExists         the object to create exists
    ├── FailedPrecondition    the object is in a state that forbids the call; do something else first
    ├── Conflict              somebody else changed the object meanwhile; read again and retry
    ├── ResourceExhausted     capacity, quota or size limit
    ├── Unavailable           a peer cannot be reached now; the same call may succeed later
    ├── DeadlineExceeded      the time allowed ran out; the outcome may be unknown
    ├── Cancelled             the caller or an operator cancelled the work
    ├── PermissionDenied      known caller, not allowed
    ├── Unauthenticated       unknown caller
    ├── Unimplemented         not offered by this driver, node or version
    ├── OutOfRange            a position that is gone (a compacted revision): relist and go on from there
    └── Internal              a defect of ours

Classes differ by what the caller can do about them. What exactly went wrong is ``reason`` (UPPER_SNAKE, stable,
part of the API) and ``metadata`` (every dynamic part of the message). The message is one sentence for a person:
what, where, how to mend.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

__all__ = [
    "ALL_ERRORS",
    "AlreadyExists",
    "Cancelled",
    "Conflict",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FieldViolation",
    "HypervisorError",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "from_kind",
    "kind_of",
    "leaf_errors",
]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request: its path (``spec.memory_mb``) and a sentence that says how to mend it."""

    field: str
    description: str


class HypervisorError(Exception):
    """Root of the tree; raise a subclass.

    ``retry_after_s`` is a hint for errors that pass by themselves (RetryInfo on the wire).
    ``violations`` lists wrong fields (BadRequest) or unmet conditions (PreconditionFailure).
    """

    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.violations = violations
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, reason={self.reason!r}, metadata={dict(self.metadata)!r})"


class InvalidArgument(HypervisorError):
    """The request is wrong, whatever the state of the system."""

    default_reason = "INVALID_ARGUMENT"

    @classmethod
    def of_field(cls, field: str, description: str, *, reason: str = "INVALID_FIELD") -> "InvalidArgument":
        """One wrong field; the message names it."""
        return cls.of_fields((FieldViolation(field, description),), reason=reason)

    @classmethod
    def of_fields(
        cls, violations: tuple[FieldViolation, ...], *, reason: str = "INVALID_FIELD"
    ) -> "InvalidArgument":
        """Several wrong fields at once, so that a user mends them in one go."""
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        fields = ",".join(v.field for v in violations)
        return cls(text, reason=reason, metadata={"field": fields}, violations=violations)


class NotFound(HypervisorError):
    """The named object does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExists(HypervisorError):
    """The object to create exists."""

    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(HypervisorError):
    """The object is in a state that forbids the call; something else must be done first."""

    default_reason = "FAILED_PRECONDITION"


class Conflict(HypervisorError):
    """Somebody else changed the object meanwhile (gRPC ABORTED): read it again and retry."""

    default_reason = "CONFLICT"


class ResourceExhausted(HypervisorError):
    """Capacity, quota or a size limit forbids it."""

    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(HypervisorError):
    """A peer (store, node, runtime) cannot be reached now; the same call may succeed later."""

    default_reason = "UNAVAILABLE"


class DeadlineExceeded(HypervisorError):
    """The time allowed ran out; whether the work was done may be unknown."""

    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(HypervisorError):
    """The caller or an operator cancelled the work."""

    default_reason = "CANCELLED"


class PermissionDenied(HypervisorError):
    """The caller is known and not allowed."""

    default_reason = "PERMISSION_DENIED"


class Unauthenticated(HypervisorError):
    """The caller is not known."""

    default_reason = "UNAUTHENTICATED"


class Unimplemented(HypervisorError):
    """Not offered by this driver, node or version; the message says which and what to use instead."""

    default_reason = "UNIMPLEMENTED"


class OutOfRange(HypervisorError):
    """A position that is gone, such as a compacted revision: list again and go on from there."""

    default_reason = "OUT_OF_RANGE"


class Internal(HypervisorError):
    """A defect of ours. On the wire its message is withheld; the log has the traceback."""

    default_reason = "INTERNAL"


ALL_ERRORS: tuple[type[HypervisorError], ...] = (
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    Conflict,
    ResourceExhausted,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    PermissionDenied,
    Unauthenticated,
    Unimplemented,
    OutOfRange,
    Internal,
)

_BY_NAME: Mapping[str, type[HypervisorError]] = MappingProxyType({cls.__name__: cls for cls in ALL_ERRORS})


def kind_of(error: HypervisorError) -> str:
    """The name of the class of the tree ``error`` belongs to: how records keep it."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _BY_NAME)


def from_kind(
    kind: str, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None
) -> HypervisorError:
    """The error that was recorded with :func:`kind_of`; a kind this version does not know becomes Internal."""
    return _BY_NAME.get(kind, Internal)(message, reason=reason, metadata=metadata)


def leaf_errors(group: BaseExceptionGroup[HypervisorError]) -> Iterator[HypervisorError]:
    """The errors in a group and the groups inside it, in order."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaf_errors(error)
        else:
            yield error
