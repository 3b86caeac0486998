"""Names for shell completion, asked of the server: quick or not at all, and never an error in somebody's prompt."""

import click

from hypervisor.core.errors import HypervisorError
from hypervisor.ctl.invocation import Invocation

__all__ = ["names"]

_PATIENCE_S = 1.0
_MOST = 200


def names(ctx: click.Context, kind: str, incomplete: str) -> list[str]:
    """Names of that kind that begin as typed so far; none where no server answers at once."""
    invocation = ctx.find_root().ensure_object(Invocation)
    try:
        found = _known(invocation, kind, incomplete)
    except HypervisorError:
        return []  # a completion has no place to report to; the command itself will
    finally:
        invocation.close()
    return [name for name in found if name.startswith(incomplete)]


def _known(invocation: Invocation, kind: str, incomplete: str) -> list[str]:
    if kind == "context":
        from hypervisor.ctl import settings

        return sorted(settings.load(settings.config_path(invocation.environ)).contexts)
    from hypervisor.ctl.session import Deadline

    session, deadline = invocation.session(), Deadline(_PATIENCE_S)
    if kind == "instance":
        from hypervisor.v1.compute_pb2 import ListInstancesRequest

        wanted = ListInstancesRequest(page_size=_MOST, filter=f"name={incomplete}*" if incomplete else "")
        instances = session.read(session.compute.ListInstances, wanted, deadline=deadline).instances
        return [item.name for item in instances]
    if kind == "image":
        from hypervisor.v1.image_pb2 import ListImagesRequest

        asked = ListImagesRequest(page_size=_MOST, filter=f"name={incomplete}*" if incomplete else "")
        return [
            item.name for item in session.read(session.images.ListImages, asked, deadline=deadline).images
        ]
    if kind == "node":
        from hypervisor.v1.cluster_pb2 import ListNodesRequest

        nodes = session.read(
            session.cluster.ListNodes, ListNodesRequest(page_size=_MOST), deadline=deadline
        ).nodes
        return [item.hostname for item in nodes]
    from hypervisor.v1.operation_pb2 import ListOperationsRequest

    request = ListOperationsRequest(page_size=_MOST)
    operations = session.read(session.operations.ListOperations, request, deadline=deadline).operations
    return [item.id for item in operations]
