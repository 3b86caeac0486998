"""``budget``: how many instances drains have to leave alone."""

import click

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.display.columns import budget_columns
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import connected, formatted, project_option
from hypervisor.ctl.output import now_s, show_list, show_one, write
from hypervisor.ctl.selectors import parse_selector, selector_of
from hypervisor.ctl.session import READ_TIMEOUT_S, translated
from hypervisor.v1.maintenance_pb2 import (
    DeleteBudgetRequest,
    DisruptionBudget,
    ListBudgetsRequest,
    SetBudgetRequest,
)

__all__ = ["budget"]


@click.group()
def budget() -> None:
    """Disruption budgets: how many of the instances with certain labels drains may take away at once."""


@budget.command("set")
@click.argument("name")
@click.option(
    "--selector",
    metavar="LABELS",
    required=True,
    help="Labels of the instances it is about, such as 'app=web' or 'app in (web, api),tier'.",
)
@click.option("--max-unavailable", type=click.IntRange(min=0), metavar="N", help="So many may be away.")
@click.option("--min-available", type=click.IntRange(min=0), metavar="N", help="So many have to be there.")
@project_option
@formatted
@connected
@pass_invocation
def set_budget(
    invocation: Invocation,
    *,
    name: str,
    selector: str,
    max_unavailable: int | None,
    min_available: int | None,
    project: str,
) -> None:
    """Make a budget, or put it in the place of the one with this name."""
    if (max_unavailable is None) == (min_available is None):
        raise InvalidArgument.of_field(
            "--max-unavailable", "give exactly one of --max-unavailable and --min-available"
        )
    wanted = DisruptionBudget(
        name=name, project=project, selector=selector_of(parse_selector("--selector", selector))
    )
    if max_unavailable is not None:
        wanted.max_unavailable = max_unavailable
    if min_available is not None:
        wanted.min_available = min_available
    session = invocation.session()
    with translated(session.server):
        made = session.maintenance.SetBudget(
            SetBudgetRequest(budget=wanted),
            timeout=invocation.deadline(READ_TIMEOUT_S).left_s(),
            metadata=session.metadata,
        )
    show_one(
        invocation,
        made,
        lambda: f"budget {made.name} set: {made.available} of {made.members} run, {made.allowed} more may go",
        name=lambda item: item.name,
    )


@budget.command("list")
@project_option
@formatted
@connected
@pass_invocation
def list_budgets(invocation: Invocation, *, project: str) -> None:
    """Show budgets, and how they stand."""
    session = invocation.session()
    found = session.read(
        session.maintenance.ListBudgets,
        ListBudgetsRequest(project=project),
        deadline=invocation.deadline(READ_TIMEOUT_S),
    ).budgets
    show_list(
        invocation,
        found,
        lambda: budget_columns(now_s()),
        name=lambda item: item.name,
        empty="No budgets. Make one with 'hypervisor-ctl budget set NAME --selector app=web --max-unavailable 1'.",
    )


@budget.command("delete")
@click.argument("name")
@project_option
@formatted
@connected
@pass_invocation
def delete_budget(invocation: Invocation, *, name: str, project: str) -> None:
    """Remove a budget."""
    session = invocation.session()
    with translated(session.server):
        session.maintenance.DeleteBudget(
            DeleteBudgetRequest(name=name, project=project),
            timeout=invocation.deadline(READ_TIMEOUT_S).left_s(),
            metadata=session.metadata,
        )
    write(name if invocation.quiet else f"budget {name} deleted")
