"""etcd's leases: their ids as text, granting, renewing, ending. Every request here is safe to repeat."""

import asyncio
import math
from contextlib import suppress

import grpc
import grpc.aio
from etcdserverpb import rpc_pb2 as pb

from hypervisor.server.store.etcd_errors import is_lease_missing
from hypervisor.server.store.etcd_members import EtcdMembers, Member
from hypervisor.server.store.validation import lease_not_found

__all__ = ["format_lease_id", "grant_lease", "parse_lease_id", "renew_lease", "revoke_lease", "stream_ended"]


def format_lease_id(lease: int) -> str:
    """As etcdctl prints it."""
    return f"{lease:016x}"


def parse_lease_id(lease_id: str) -> int:
    """The number of a lease; raises ``NotFound`` for what cannot be one."""
    try:
        lease = int(lease_id, 16)
    except ValueError:
        raise lease_not_found(lease_id) from None
    if not 0 < lease < 1 << 63:
        raise lease_not_found(lease_id)
    return lease


async def grant_lease(members: EtcdMembers, ttl_s: float) -> pb.LeaseGrantResponse:
    """A new lease of whole seconds. One whose answer was lost ends by itself, unused."""
    grant = pb.LeaseGrantRequest(ttl=math.ceil(ttl_s))

    async def request(member: Member, timeout_s: float) -> pb.LeaseGrantResponse:
        return await member.lease.LeaseGrant(grant, timeout=timeout_s)

    return await members.repeat(request)


async def renew_lease(members: EtcdMembers, lease: int) -> int:
    """Renew a lease; returns the seconds it now has, 0 or less when it has ended."""

    async def request(member: Member, timeout_s: float) -> int:
        call = member.lease.LeaseKeepAlive(None, timeout=timeout_s)
        try:
            # A write to a call that has failed says so without the cause; the read tells it.
            with suppress(asyncio.InvalidStateError):
                await call.write(pb.LeaseKeepAliveRequest(id=lease))
                await call.done_writing()
            response = await call.read()
            if not isinstance(response, pb.LeaseKeepAliveResponse):
                raise stream_ended("no answer came")
            return response.ttl
        except grpc.aio.AioRpcError as exc:
            if is_lease_missing(exc):
                return 0
            raise
        finally:
            call.cancel()

    return await members.repeat(request)


async def revoke_lease(members: EtcdMembers, lease: int) -> None:
    """End a lease; nothing happens when it has ended."""
    revoke = pb.LeaseRevokeRequest(id=lease)

    async def request(member: Member, timeout_s: float) -> None:
        try:
            await member.lease.LeaseRevoke(revoke, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            if not is_lease_missing(exc):
                raise

    await members.repeat(request)


def stream_ended(why: str) -> grpc.aio.AioRpcError:
    """The error of a stream that the server ended, properly but too early."""
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(),
        details=f"the stream ended: {why}",
        debug_error_string=None,
    )
