"""Deletes every instance of a development cluster, as part of ``dev down``."""

import uuid
from concurrent.futures import ThreadPoolExecutor

from hypervisor.core.errors import HypervisorError, NotFound
from hypervisor.ctl.calls import perform
from hypervisor.ctl.dev.plan import Plan
from hypervisor.ctl.paging import list_all
from hypervisor.ctl.session import Deadline, Session
from hypervisor.ctl.settings import Connection
from hypervisor.v1.compute_pb2 import DeleteInstanceRequest, ListInstancesRequest

__all__ = ["delete_all_instances"]

_EACH_S = 30.0
_AT_ONCE = 8


def delete_all_instances(plan: Plan) -> tuple[int, list[str]]:
    """How many were deleted, and a sentence for each that could not be. Raises when the server does not answer."""
    with Session(Connection(plan.server_address, tls=None, token=None, context=None)) as session:
        found = list_all(
            session,
            session.compute.ListInstances,
            ListInstancesRequest(),
            lambda page: page.instances,
            deadline=Deadline(10.0),
        )

        def delete(instance_id: str) -> str | None:
            request = DeleteInstanceRequest(instance=instance_id, force=True, request_id=str(uuid.uuid4()))
            try:
                perform(session, session.compute.DeleteInstance, request, deadline=Deadline(_EACH_S))
            except NotFound:
                return None  # somebody else was quicker
            except HypervisorError as exc:
                return f"{instance_id} could not be deleted: {exc}"
            return None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            failures = [text for text in pool.map(delete, [item.id for item in found]) if text]
    return len(found) - len(failures), failures
