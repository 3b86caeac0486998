"""``instance explain``: why an instance is where it is."""

import click

from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, formatted, project_option
from hypervisor.ctl.output import show_one
from hypervisor.ctl.session import READ_TIMEOUT_S
from hypervisor.v1.compute_pb2 import ExplainPlacementRequest

__all__ = ["explain", "show_explanation"]


@click.command("explain")
@click.argument("instance", type=NAME("instance"))
@click.option(
    "--node", metavar="NODE", type=NAME("node"), default="", help="Say why (or why not) there, too."
)
@click.option(
    "--nodes",
    "max_nodes",
    metavar="N",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="How many nodes to compare.",
)
@project_option
@formatted
@connected
@pass_invocation
def explain(invocation: Invocation, *, instance: str, node: str, max_nodes: int, project: str) -> None:
    """Show why an instance is on its node, and what else there is.

    What was decided when it was placed is on record; the comparison is computed now, as if it were placed anew.
    """
    request = ExplainPlacementRequest(instance=instance, project=project, node=node, max_nodes=max_nodes)
    show_explanation(invocation, request)


def show_explanation(invocation: Invocation, request: ExplainPlacementRequest) -> None:
    """Ask for an explanation and print it."""
    session = invocation.session()
    found = session.read(
        session.compute.ExplainPlacement, request, deadline=invocation.deadline(READ_TIMEOUT_S)
    )

    def text() -> str:
        from hypervisor.ctl.display.placements import explanation_text

        return explanation_text(found, name=request.instance or request.would_be.name)

    show_one(invocation, found, text, name=lambda item: item.hostname)
