"""The agent's gRPC server: AgentService, health and reflection on one port."""

import asyncio
from types import TracebackType

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from hypervisor.agent.api.agent_service import AgentService
from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.errors import FailedPrecondition, Unavailable
from hypervisor.core.ids import IdSource
from hypervisor.wire.flow import STREAM_OPTIONS
from hypervisor.wire.rpc import Call, Dispatcher

__all__ = ["AgentServer"]

_SERVICE = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
_STREAM_ENDS_S = 1
_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    *STREAM_OPTIONS,
)


class AgentServer:
    """Bound when made, serving between enter and exit. ``port`` is the one really taken."""

    def __init__(
        self,
        *,
        bind: str,
        port: int,
        credentials: grpc.ServerCredentials | None,
        new_id: IdSource,
        grace_s: float,
    ) -> None:
        self._grace_s = grace_s
        self._health = health_aio.HealthServicer()
        # Who may call is settled by the connection: client certificates, or a loopback address.
        self._dispatcher = Dispatcher(
            authenticate=_peer_name, metrics=None, new_id=new_id, stopping=_stopping
        )
        self._server = grpc.aio.server(options=_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (_SERVICE.full_name, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)
        where = f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(where)
            else:
                self.port = self._server.add_secure_port(where, credentials)
        except RuntimeError as exc:
            raise FailedPrecondition(
                f"the agent cannot listen on {where}: is it in use, or agent.bind not an address of this machine?",
                reason="ADDRESS_UNUSABLE",
                metadata={"address": where},
            ) from exc

    def offer(self, service: AgentService) -> None:
        """The service to serve; before entering."""
        handler = self._dispatcher.service(_SERVICE, service.handlers())
        self._server.add_generic_rpc_handlers((handler,))

    async def __aenter__(self) -> "AgentServer":
        await self._server.start()
        for name in ("", _SERVICE.full_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self._server.stop(self._grace_s))
        # Viewers that were let go end by themselves in a moment; other streams would go on for ever.
        for _ in range(_STREAM_ENDS_S * 20):
            if self._dispatcher.in_progress == 0:
                break
            await asyncio.sleep(0.05)
        self._dispatcher.stop_streams()
        await stopping


def _peer_name(call: Call) -> str:
    return call.certificate_name() or "local"


def _stopping() -> Unavailable:
    return Unavailable(
        "this node's agent is stopping: repeat the call when it is back",
        reason="AGENT_STOPPING",
        retry_after_s=1.0,
    )
