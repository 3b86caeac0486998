"""The gRPC server: all services with reflection and health, on one address."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition
from hypervisor.server.api.backups import BackupHandlers
from hypervisor.server.api.console import ConsoleHandlers
from hypervisor.server.api.drains import DrainHandlers
from hypervisor.server.api.encoding import Encoder
from hypervisor.server.api.events import EventHandlers
from hypervisor.server.api.fresh import looking_again
from hypervisor.server.api.images import ImageHandlers
from hypervisor.server.api.instance_states import InstanceStateHandlers
from hypervisor.server.api.instances import InstanceHandlers
from hypervisor.server.api.moves import MoveHandlers
from hypervisor.server.api.nodes import About, ClusterIdentity, NodeHandlers
from hypervisor.server.api.operations import OperationHandlers
from hypervisor.server.api.placements import PlacementHandlers
from hypervisor.server.api.rpc import Dispatcher
from hypervisor.server.backups import Backups
from hypervisor.server.explaining import Explainer
from hypervisor.server.images.contract import Images
from hypervisor.server.services import ClusterView, Instances, Maintenance, Moves, Nodes, Operations
from hypervisor.v1 import backup_pb2, cluster_pb2, compute_pb2, image_pb2, maintenance_pb2, operation_pb2
from hypervisor.wire.flow import STREAM_OPTIONS

__all__ = ["Api", "ApiServer", "make_server"]

_BACKUP = backup_pb2.DESCRIPTOR.services_by_name["BackupService"]
_CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"]
_COMPUTE = compute_pb2.DESCRIPTOR.services_by_name["ComputeService"]
_MAINTENANCE = maintenance_pb2.DESCRIPTOR.services_by_name["MaintenanceService"]
_IMAGE = image_pb2.DESCRIPTOR.services_by_name["ImageService"]
_OPERATION = operation_pb2.DESCRIPTOR.services_by_name["OperationService"]
SERVICE_NAMES = tuple(
    service.full_name for service in (_BACKUP, _CLUSTER, _COMPUTE, _IMAGE, _MAINTENANCE, _OPERATION)
)


@dataclass(frozen=True, slots=True)
class Api:
    """What the handlers work on."""

    view: ClusterView
    identity: ClusterIdentity
    instances: Instances
    moves: Moves
    maintenance: Maintenance
    nodes: Nodes
    operations: Operations
    images: Images
    explainer: Explainer
    backups: Backups
    clock: Clock
    about: About

    def register(self, server: grpc.aio.Server, dispatcher: Dispatcher) -> None:
        """Put every method of every service on the server."""
        encoder = Encoder(self.view, self.instances, self.nodes, self.clock)
        instances = InstanceHandlers(self.view, self.instances, encoder, self.explainer)
        states = InstanceStateHandlers(self.instances, encoder)
        placements = PlacementHandlers(self.instances, self.explainer)
        nodes = NodeHandlers(self.view, self.nodes, encoder, self.identity, about=self.about)
        operations = OperationHandlers(self.view, self.operations, encoder)
        events = EventHandlers(self.view, encoder, self.clock)
        images = ImageHandlers(self.view, self.images, encoder)
        console = ConsoleHandlers(self.instances)
        moves = MoveHandlers(self.moves, encoder)
        drains = DrainHandlers(self.maintenance, encoder, self.clock)
        compute = (
            instances.handlers | states.handlers | console.handlers | placements.compute | moves.handlers
        )
        services = (
            (_COMPUTE, compute),
            (_CLUSTER, nodes.handlers | events.handlers | placements.cluster | drains.cluster),
            (_MAINTENANCE, drains.maintenance),
            (_BACKUP, BackupHandlers(self.backups).handlers),
            (_IMAGE, images.handlers),
            (_OPERATION, operations.handlers),
        )
        server.add_generic_rpc_handlers(
            tuple(
                dispatcher.service(service, looking_again(handlers, self.view.catch_up))
                for service, handlers in services
            )
        )


class ApiServer:
    """A listening gRPC server with reflection and health. It serves after :meth:`start`."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self._server = server
        self._health = health.aio.HealthServicer()
        self.port = port
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def start(self) -> None:
        """Serve."""
        await self._server.start()

    async def set_healthy(self, healthy: bool) -> None:
        """What the health service answers for the server and for each of its services."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, status)

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls; return when those in progress have ended, or were cut off after ``grace_s``."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def make_server(
    address: str,
    *,
    credentials: grpc.ServerCredentials | None,
    max_message_bytes: int,
    max_concurrent_calls: int,
    extra_options: Sequence[tuple[str, int]] = (),
) -> tuple[grpc.aio.Server, int]:
    """A gRPC server that listens on ``address``, and its port.

    Raises FailedPrecondition (``ADDRESS_IN_USE``) where it cannot listen.
    """
    options = {
        # Two servers on one port would both get a share of the calls, without a word.
        "grpc.so_reuseport": 0,
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": -1,
        # Watchers and consoles are long and silent, and agents are silent between heartbeats; both may ask whether we
        # are still there.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": 5_000,
        "grpc.http2.max_pings_without_data": 0,
        **dict(STREAM_OPTIONS),
        # Of an option that is given twice gRPC takes the first.
        **dict(extra_options),
    }
    server = grpc.aio.server(maximum_concurrent_rpcs=max_concurrent_calls, options=list(options.items()))
    cause: RuntimeError | None = None
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as exc:
        port, cause = 0, exc
    if port == 0:
        raise FailedPrecondition(
            f"server.grpc_address {address} cannot be listened on: is another program using it, and is the address one "
            "of this machine?",
            reason="ADDRESS_IN_USE",
            metadata={"address": address},
        ) from cause
    return server, port
