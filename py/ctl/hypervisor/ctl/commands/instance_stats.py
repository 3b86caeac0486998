"""``instance stats``: one sample, or samples as they come."""

import sys

import click

from hypervisor.ctl.display.columns import stats_columns
from hypervisor.ctl.display.table import render
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import DURATION, NAME, connected, formatted, project_option
from hypervisor.ctl.output import show_list, terminal_width, write
from hypervisor.ctl.session import READ_TIMEOUT_S, translated
from hypervisor.v1.compute_pb2 import GetInstanceStatsRequest, WatchInstanceStatsRequest
from hypervisor.v1.instance_pb2 import InstanceStats

__all__ = ["stats"]

_HEADINGS_EVERY = 20
_SAMPLE_WIDTH = 8


@click.command("stats")
@click.argument("instance", type=NAME("instance"))
@click.option("-w", "--watch", is_flag=True, help="A line for each sample, until the instance ends.")
@click.option(
    "--interval",
    type=DURATION,
    metavar="DURATION",
    help="Time between samples of --watch, 100ms to 60s. Default: 1s.",
)
@click.option(
    "--history",
    type=DURATION,
    metavar="DURATION",
    help="Begin --watch with the samples of this long ago until now, as far as the node has them. At most 1h.",
)
@project_option
@formatted
@connected
@pass_invocation
def stats(
    invocation: Invocation,
    *,
    instance: str,
    watch: bool,
    interval: float | None,
    history: float | None,
    project: str,
) -> None:
    """Show what an instance uses: processor, memory, processes, block devices and network.

    Times of day are UTC; what ends in /S is per second, since the sample before. -o wide adds totals, throttling, and
    the share of time in which it waited for a resource.
    """
    for option, given in (("--interval", interval), ("--history", history)):
        if given is not None and not watch:
            raise click.UsageError(f"{option} goes with --watch: one sample is shown without it")
    session = invocation.session()
    if watch:
        request = WatchInstanceStatsRequest(instance=instance, project=project)
        if interval is not None:
            request.interval.FromNanoseconds(int(interval * 1e9))
        if history is not None:
            request.history.FromNanoseconds(int(history * 1e9))
        timeout_s = invocation.timeout_s
        with translated(session.server):
            samples = session.compute.WatchInstanceStats(
                request, timeout=timeout_s, metadata=session.metadata
            )
            for number, sample in enumerate(samples):
                _print_sample(invocation, instance, sample, number)
        return
    sample = session.read(
        session.compute.GetInstanceStats,
        GetInstanceStatsRequest(instance=instance, project=project),
        deadline=invocation.deadline(READ_TIMEOUT_S),
    )
    if invocation.output in ("json", "yaml"):
        _print_sample(invocation, instance, sample, 0)
        return
    show_list(invocation, [sample], lambda: stats_columns(instance), name=lambda item: instance, empty="")


def _print_sample(invocation: Invocation, instance: str, sample: InstanceStats, number: int) -> None:
    if invocation.output in ("json", "yaml"):
        from hypervisor.ctl.display import documents

        one_line = documents.as_json(sample, indent=None)
        write(one_line if invocation.output == "json" else "---\n" + documents.as_yaml(sample))
        return
    on_terminal = sys.stdout.isatty()
    headers = invocation.headers and (number == 0 or (on_terminal and number % _HEADINGS_EVERY == 0))
    lines = render(
        stats_columns(instance, timed=True),
        [sample],
        wide=invocation.output == "wide",
        headers=True,
        width=terminal_width(sys.stdout),
        at_least=_SAMPLE_WIDTH,
    )
    write("\n".join(lines if headers else lines[1:]))
