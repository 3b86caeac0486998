"""The store on etcd's v3 API, for several servers: a small client of our own over grpc.aio.

Why not an existing client: docs/decisions/0003-etcd-client.md. Commits whose answer is lost are settled in
:mod:`etcd_commit`, watches resume in :mod:`etcd_watch`, connections are chosen in :mod:`etcd_members`.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
import structlog
from etcdserverpb import rpc_pb2 as pb

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, InvalidArgument, NotFound
from hypervisor.core.tls import ClientTls, channel_credentials
from hypervisor.server.store.config import EtcdTls, StoreConfig
from hypervisor.server.store.election import Candidacy
from hypervisor.server.store.etcd_commit import Applied, EtcdCommitter
from hypervisor.server.store.etcd_errors import is_compacted
from hypervisor.server.store.etcd_leases import (
    format_lease_id,
    grant_lease,
    parse_lease_id,
    renew_lease,
    revoke_lease,
)
from hypervisor.server.store.etcd_members import EtcdMembers, Member, parse_endpoint
from hypervisor.server.store.etcd_watch import EtcdWatch, to_item
from hypervisor.server.store.storage import (
    Committed,
    Compare,
    Conflicted,
    Delete,
    Election,
    Item,
    Lease,
    Operation,
    Page,
    WatchBatch,
)
from hypervisor.server.store.validation import (
    check_commit,
    check_key,
    check_list,
    check_prefix,
    check_ttl,
    lease_not_found,
    prefix_end,
)

__all__ = ["EtcdStorage"]

_CLOSE_TIMEOUT_S = 2.0

log = structlog.get_logger(__name__)


class EtcdStorage:
    """Implements ``Storage``. Open it with ``EtcdStorage.open``."""

    def __init__(self, members: EtcdMembers, *, clock: Clock, rng: random.Random) -> None:
        self._members = members
        self._clock = clock
        self._rng = rng
        self._committer = EtcdCommitter(members, clock=clock)
        self._keeper: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, config: StoreConfig, *, clock: Clock) -> "EtcdStorage":
        """Connect. Raises ``Unavailable`` when no member answers, ``InvalidArgument`` for bad settings."""
        if not config.endpoints:
            raise InvalidArgument.of_field(
                "store.endpoints", "is empty; name etcd's members, such as 127.0.0.1:2379"
            )
        tls = config.tls
        members = EtcdMembers(
            [parse_endpoint(endpoint, tls=tls is not None) for endpoint in config.endpoints],
            credentials=None if tls is None else await asyncio.to_thread(_credentials, tls),
            server_name="" if tls is None else tls.server_name,
            dial_timeout_s=config.dial_timeout_s,
            request_timeout_s=config.request_timeout_s,
            clock=clock,
        )
        storage = cls(members, clock=clock, rng=random.Random())
        try:
            status = await members.repeat(_status)
        except BaseException:
            await members.aclose()
            raise
        storage._keeper = asyncio.create_task(storage._committer.run(), name="store-commit-lease")
        log.info(
            "store_opened",
            endpoints=",".join(config.endpoints),
            etcd_version=status.version,
            revision=status.header.revision,
            alarms=list(status.errors),
        )
        return storage

    async def get(self, key: str) -> Item | None:
        """See ``Storage.get``."""
        check_key(key)
        response = await self._members.repeat(partial(_range, pb.RangeRequest(key=key.encode())))
        return to_item(response.kvs[0]) if response.kvs else None

    async def list(
        self, prefix: str, *, start_key: str = "", limit: int = 1000, revision: int | None = None
    ) -> Page:
        """See ``Storage.list``."""
        check_list(prefix, start_key=start_key, limit=limit, revision=revision)
        request = pb.RangeRequest(
            key=(start_key or prefix or "/").encode(),
            range_end=prefix_end(prefix),
            limit=limit + 1,
            # 0 would mean "now"; nothing was ever written at 1, the revision of a new etcd.
            revision=0 if revision is None else max(1, revision),
        )
        response = await self._members.repeat(partial(_range, request))
        items = [to_item(kv) for kv in response.kvs]
        next_key = items.pop().key if len(items) > limit else ""
        return Page(tuple(items), response.header.revision if revision is None else revision, next_key)

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[Operation]
    ) -> Committed | Conflicted:
        """See ``Storage.commit``."""
        check_commit(compares, operations)
        conditions = [_compare(compare) for compare in compares]
        reads = [_read(compare.key) for compare in compares]
        if operations:
            outcome = await self._committer.commit(conditions, [_operation(o) for o in operations], reads)
            if isinstance(outcome, Applied):
                return Committed(outcome.revision)
            return _conflicted(compares, outcome.revision, outcome.responses)
        response = await self._members.repeat(partial(_txn, pb.TxnRequest(compare=conditions, failure=reads)))
        if response.succeeded:
            return Committed(response.header.revision)
        return _conflicted(compares, response.header.revision, response.responses)

    def watch(
        self, prefix: str, *, after_revision: int, with_previous: bool = True
    ) -> AsyncGenerator[WatchBatch, None]:
        """See ``Storage.watch``."""
        check_prefix(prefix)
        watch = EtcdWatch(
            self._members,
            prefix,
            after_revision=after_revision,
            with_previous=with_previous,
            clock=self._clock,
            rng=self._rng,
        )
        return watch.batches()

    async def grant_lease(self, ttl_s: float) -> Lease:
        """See ``Storage.grant_lease``. etcd counts in whole seconds and has a minimum of its own."""
        check_ttl(ttl_s)
        granted = await grant_lease(self._members, ttl_s)
        return Lease(format_lease_id(granted.id), float(granted.ttl))

    async def keep_alive(self, lease_id: str) -> float:
        """See ``Storage.keep_alive``."""
        ttl_s = await renew_lease(self._members, parse_lease_id(lease_id))
        if ttl_s <= 0:
            raise lease_not_found(lease_id)
        return float(ttl_s)

    async def revoke_lease(self, lease_id: str) -> None:
        """See ``Storage.revoke_lease``."""
        try:
            lease = parse_lease_id(lease_id)
        except NotFound:
            self._members.check_open()
            return
        await revoke_lease(self._members, lease)

    def election(
        self, name: str, candidate_id: str, *, ttl_s: float
    ) -> AbstractAsyncContextManager[Election]:
        """See ``Storage.election``."""
        return Candidacy(self, name, candidate_id, ttl_s=ttl_s, clock=self._clock)

    async def compact(self, revision: int) -> None:
        """See ``Storage.compact``."""
        newest = await self.current_revision()
        if revision > newest:
            raise InvalidArgument.of_field("revision", f"{revision} is newer than the store ({newest})")
        if revision > 0:
            await self._members.repeat(partial(_compact, pb.CompactionRequest(revision=revision)))

    async def current_revision(self) -> int:
        """See ``Storage.current_revision``."""
        request = pb.RangeRequest(key=b"/", count_only=True)
        return (await self._members.repeat(partial(_range, request))).header.revision

    async def aclose(self) -> None:
        """See ``Storage.aclose``."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="store-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        # A courtesy to etcd, bounded: what is not removed goes with its lease.
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._committer.aclose()
        except (HypervisorError, TimeoutError) as exc:
            log.warning("store_commit_slots_left", error=str(exc))
        await self._members.aclose()


def _credentials(tls: EtcdTls) -> grpc.ChannelCredentials:
    ca_file, cert_file, key_file = (
        Path(path) if path else None for path in (tls.ca_file, tls.cert_file, tls.key_file)
    )
    return channel_credentials(ClientTls(ca_file=ca_file, cert_file=cert_file, key_file=key_file))


def _compare(compare: Compare) -> pb.Compare:
    return pb.Compare(
        result=pb.Compare.EQUAL,
        target=pb.Compare.MOD,
        key=compare.key.encode(),
        mod_revision=compare.mod_revision,
    )


def _read(key: str) -> pb.RequestOp:
    return pb.RequestOp(request_range=pb.RangeRequest(key=key.encode()))


def _operation(operation: Operation) -> pb.RequestOp:
    key = operation.key.encode()
    if isinstance(operation, Delete):
        return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
    lease = parse_lease_id(operation.lease_id) if operation.lease_id else 0
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=operation.value, lease=lease))


def _conflicted(compares: Sequence[Compare], revision: int, responses: Sequence[pb.ResponseOp]) -> Conflicted:
    current: dict[str, Item | None] = {}
    for compare, response in zip(compares, responses, strict=True):
        kvs = response.response_range.kvs
        current[compare.key] = to_item(kvs[0]) if kvs else None
    return Conflicted(revision, current)


async def _range(request: pb.RangeRequest, member: Member, timeout_s: float) -> pb.RangeResponse:
    return await member.kv.Range(request, timeout=timeout_s)


async def _txn(request: pb.TxnRequest, member: Member, timeout_s: float) -> pb.TxnResponse:
    return await member.kv.Txn(request, timeout=timeout_s)


async def _compact(request: pb.CompactionRequest, member: Member, timeout_s: float) -> None:
    try:
        await member.kv.Compact(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as exc:
        if not is_compacted(exc):
            raise


async def _status(member: Member, timeout_s: float) -> pb.StatusResponse:
    return await member.maintenance.Status(pb.StatusRequest(), timeout=timeout_s)
