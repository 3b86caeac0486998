"""The error tree on the wire and back: gRPC code + one ErrorInfo, with BadRequest, PreconditionFailure, RetryInfo.

The only module of core that knows ``google.rpc``. Server and agent use :func:`to_status`; the clients (server to
agent, command line to server) use :func:`from_rpc_error`, so that both sides of a call see the same classes.
The reason of an unknown error is honest: INTERNAL, its message withheld.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hypervisor.core import errors

__all__ = [
    "DOMAIN",
    "RpcFailure",
    "code_of",
    "error_of_status",
    "from_rpc_error",
    "to_status",
    "trailing_metadata",
]

DOMAIN = "hypervisor"
_DETAILS_KEY = "grpc-status-details-bin"
_HEADER_BUDGET = 6_000
"""Bytes of message and metadata kept: gRPC peers refuse trailers over 8 KiB by default."""

_CODES: Mapping[type[errors.HypervisorError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Internal: grpc.StatusCode.INTERNAL,
}
_CLASSES: Mapping[grpc.StatusCode, type[errors.HypervisorError]] = {code: cls for cls, code in _CODES.items()}


class RpcFailure(Protocol):
    """What grpc.RpcError (sync) and grpc.aio.AioRpcError have in common."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def code_of(error: errors.HypervisorError) -> grpc.StatusCode:
    """The gRPC code of an error of the tree; a subclass has the code of its nearest ancestor in the table."""
    for cls in type(error).__mro__:
        if cls in _CODES:
            return _CODES[cls]
    return grpc.StatusCode.INTERNAL


def to_status(error: errors.HypervisorError) -> status_pb2.Status:
    """The error as google.rpc.Status. The message of Internal is withheld (the log has it)."""
    code = code_of(error)
    message = "internal error: see the server's log" if isinstance(error, errors.Internal) else error.message
    message = message[: _HEADER_BUDGET // 2]
    budget = _HEADER_BUDGET - len(message.encode())
    metadata: dict[str, str] = {}
    for key, value in error.metadata.items():
        budget -= len(key.encode()) + len(value.encode()) + 8
        if budget < 0:
            break
        metadata[key] = value
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    violations = error.violations[:16]
    if violations and isinstance(error, errors.InvalidArgument):
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field[:200], description=v.description[:300]
                    )
                    for v in violations
                ]
            )
        )
    elif violations:
        details.append(
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type=error.reason, subject=v.field[:200], description=v.description[:300]
                    )
                    for v in violations
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        item = any_pb2.Any()
        item.Pack(detail)
        packed.append(item)
    number: int = code.value[0]
    return status_pb2.Status(code=number, message=message, details=packed)


def trailing_metadata(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailers that carry the details."""
    return ((_DETAILS_KEY, status.SerializeToString()),)


def error_of_status(status: status_pb2.Status) -> errors.HypervisorError:
    """The error a google.rpc.Status stands for; codes outside the tree become Internal."""
    name = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    cls = _CLASSES.get(getattr(grpc.StatusCode, name, grpc.StatusCode.UNKNOWN), errors.Internal)
    reason: str | None = None
    metadata: dict[str, str] = {}
    violations: tuple[errors.FieldViolation, ...] = ()
    retry_after_s: float | None = None
    for item in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        unmet = error_details_pb2.PreconditionFailure()
        again = error_details_pb2.RetryInfo()
        if item.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif item.Unpack(bad):
            violations = tuple(errors.FieldViolation(v.field, v.description) for v in bad.field_violations)
        elif item.Unpack(unmet):
            violations = tuple(errors.FieldViolation(v.subject, v.description) for v in unmet.violations)
        elif item.Unpack(again):
            retry_after_s = again.retry_delay.ToNanoseconds() / 1e9
    return cls(
        status.message, reason=reason, metadata=metadata, violations=violations, retry_after_s=retry_after_s
    )


def from_rpc_error(failure: RpcFailure, *, peer: str) -> errors.HypervisorError:
    """The error behind a failed call. ``peer`` names the other side in errors that gRPC itself made."""
    for key, value in failure.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            status = status_pb2.Status()
            status.ParseFromString(value)
            return error_of_status(status)
    code = failure.code()
    text = failure.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(
            f"{peer} cannot be reached: {text}",
            reason="PEER_UNREACHABLE",
            metadata={"peer": peer},
            retry_after_s=1.0,
        )
    if code is grpc.StatusCode.UNKNOWN:
        return errors.Internal(f"{peer} failed: {text}", metadata={"peer": peer})
    return _CLASSES.get(code, errors.Internal)(f"{peer}: {text}", metadata={"peer": peer})
