"""ComputeService: moving instances to other nodes. Parses, calls, converts."""

from hypervisor.server.api.digest import payload_digest
from hypervisor.server.api.encoding import Encoder
from hypervisor.server.api.instance_requests import stop_options, versioned_ref_of
from hypervisor.server.api.move_requests import MAX_HEALTHY_S, strategy_of
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import MAX_OBJECT_NAME, Violations
from hypervisor.server.services import MoveOrder, Moves, Mutation
from hypervisor.v1 import compute_pb2, operation_pb2

__all__ = ["MoveHandlers"]


class MoveHandlers:
    """The handlers by method name: :attr:`handlers`."""

    def __init__(self, moves: Moves, encoder: Encoder) -> None:
        self._moves = moves
        self._encoder = encoder

    @property
    def handlers(self) -> dict[str, Handler]:
        """This part of what ComputeService offers."""
        return {"MoveInstance": self.move}

    async def move(self, request: compute_pb2.MoveInstanceRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        wrong.request_id(request.request_id)
        ref = versioned_ref_of(request, wrong=wrong)
        if len(request.node) > MAX_OBJECT_NAME:
            wrong.add("node", f"is {len(request.node)} characters long: give a node's id or host name")
        strategy = strategy_of(wrong, "strategy", request.strategy)
        healthy_s = None
        if request.HasField("healthy_after"):
            healthy_s = wrong.seconds(
                "healthy_after", request.healthy_after, at_least=0.0, at_most=MAX_HEALTHY_S
            )
        stop = stop_options(wrong, request.stop)
        wrong.check()
        mutation = Mutation(
            caller=call.caller,
            request_id=request.request_id,
            payload_digest=payload_digest(request),
            wait=not request.no_wait,
        )
        order = MoveOrder(
            node=request.node,
            strategy=strategy,
            allow_disk_loss=request.allow_disk_loss,
            healthy_s=healthy_s,
            reason=f"moved by {call.principal}",
        )
        decided = await self._moves.move(ref, mutation, order=order, grace_s=stop.grace_s)
        return self._encoder.operation(decided)
