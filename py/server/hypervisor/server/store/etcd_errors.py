"""etcd's gRPC statuses as errors of ours. Its texts are part of its API (api/v3rpc/rpctypes/error.go)."""

import grpc
import grpc.aio

from hypervisor.core.errors import (
    FailedPrecondition,
    HypervisorError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from hypervisor.server.store.storage import Compacted

__all__ = ["is_compacted", "is_lease_missing", "may_have_been_applied", "translate", "unreachable"]

_RETRY_AFTER_S = 1.0

_REFUSED_BEFORE_APPLYING = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


def may_have_been_applied(exc: grpc.aio.AioRpcError) -> bool:
    """Whether a transaction that failed like this may have been applied, or may yet be.

    True for a full database too: the member that notices the quota while applying answers NOSPACE although
    it has applied the transaction.
    """
    return exc.code() not in _REFUSED_BEFORE_APPLYING


def is_lease_missing(exc: grpc.aio.AioRpcError) -> bool:
    """Whether a lease named in the request has ended."""
    return exc.code() is grpc.StatusCode.NOT_FOUND and "lease not found" in (exc.details() or "")


def is_compacted(exc: grpc.aio.AioRpcError) -> bool:
    """Whether the revision named in the request is compacted (and not: in the future)."""
    return exc.code() is grpc.StatusCode.OUT_OF_RANGE and "compacted" in (exc.details() or "")


def translate(exc: grpc.aio.AioRpcError, endpoint: str) -> HypervisorError:
    """The error to raise for ``exc``. Chain it: ``raise translate(exc, endpoint) from exc``."""
    code, details = exc.code(), exc.details() or ""
    metadata = {"endpoint": endpoint, "status": code.name}
    if code is grpc.StatusCode.OUT_OF_RANGE:
        return Compacted(f"the revision is not in etcd's history ({details}): list again", metadata=metadata)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space exceeded" in details:
        return ResourceExhausted(
            f"etcd at {endpoint} has reached its database quota: compact, defragment, disarm the alarm, or raise "
            "--quota-backend-bytes; nothing was written",
            reason="STORE_DISK_FULL",
            metadata=metadata,
            retry_after_s=_RETRY_AFTER_S,
        )
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return FailedPrecondition(
            f"etcd at {endpoint} refuses this server ({details}): check the client certificate and its role",
            reason="STORE_ACCESS_DENIED",
            metadata=metadata,
        )
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgument(
            f"etcd at {endpoint} refused the request: {details}", reason="STORE_REFUSED", metadata=metadata
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return FailedPrecondition(
            f"{endpoint} does not offer etcd's v3 API ({details}): check store.endpoints",
            reason="STORE_NOT_ETCD",
            metadata=metadata,
        )
    return Unavailable(
        f"etcd at {endpoint} did not answer the request ({code.name}: {details})",
        reason="STORE_UNAVAILABLE",
        metadata=metadata,
        retry_after_s=_RETRY_AFTER_S,
    )


def unreachable(endpoints: str, timeout_s: float, why: str) -> Unavailable:
    """No member could be reached; nothing was sent."""
    return Unavailable(
        f"no etcd member of {endpoints} could be reached in {timeout_s:g} s ({why}): check that etcd runs and that "
        "the endpoints are right",
        reason="STORE_UNAVAILABLE",
        metadata={"endpoints": endpoints},
        retry_after_s=_RETRY_AFTER_S,
    )
