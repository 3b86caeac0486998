"""``instance logs``."""

import os
import sys

import click

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.core.units import parse_bytes
from hypervisor.ctl.console.since import parse_since
from hypervisor.ctl.console.terminal import write_all
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, project_option, quietly
from hypervisor.ctl.output import note
from hypervisor.ctl.session import translated
from hypervisor.v1.instance_pb2 import GetInstanceLogsRequest

__all__ = ["logs"]

_MAX_LINES = 1_000_000


@click.command("logs")
@click.argument("instance", type=NAME("instance"))
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed, until the instance ends.")
@click.option(
    "--since",
    metavar="WHEN",
    help="From then on: 5m (so far back), a time such as 2026-01-31T12:00Z, or @POSITION.",
)
@click.option(
    "--tail",
    metavar="AMOUNT",
    help="The last lines (a number, such as 100) or bytes (a size, such as 16KiB) only.",
)
@project_option
@quietly
@connected
@pass_invocation
def logs(
    invocation: Invocation, *, instance: str, follow: bool, since: str | None, tail: str | None, project: str
) -> None:
    """Print what an instance printed on its console, as far as its node keeps it. It need not run.

    The bytes are those of a terminal, as they were printed. What is kept is set on the node: console.log.max_bytes and
    console.log.files of the agent's configuration.
    """
    if since is not None and tail is not None:
        raise click.UsageError("--since and --tail do not go together")
    request = GetInstanceLogsRequest(instance=instance, project=project, follow=follow)
    if since is not None:
        _begin(request, since)
    if tail is not None:
        _end(request, tail)
    session = invocation.session()
    output = sys.stdout.fileno()
    sys.stdout.flush()
    with translated(session.server):
        call = session.compute.GetInstanceLogs(
            request, timeout=invocation.timeout_s, metadata=session.metadata
        )
        try:
            for chunk in call:
                if chunk.skipped_bytes and not invocation.quiet:
                    note(f"[{chunk.skipped_bytes} bytes are not here: {_why(follow=follow)}]")
                write_all(output, chunk.data)
        except BrokenPipeError:
            # `| head` has seen enough. Whatever is flushed at the end must not say so again.
            call.cancel()
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def _begin(request: GetInstanceLogsRequest, text: str) -> None:
    since = parse_since("--since", text)
    if since.ago is not None:
        request.since.CopyFrom(since.ago)
    elif since.time is not None:
        request.from_time.CopyFrom(since.time)
    elif since.position is not None:
        request.from_position = since.position


def _end(request: GetInstanceLogsRequest, text: str) -> None:
    try:
        if text.isascii() and text.isdigit():
            request.tail_lines = _lines(text)
        else:
            request.tail_bytes = parse_bytes(text)
    except ValueError as exc:
        raise InvalidArgument.of_field(
            "--tail", f"{shorten(text)}: give up to 1000000 lines, such as 100, or a size such as 16KiB"
        ) from exc


def _lines(text: str) -> int:
    lines = int(text[:9])
    if lines > _MAX_LINES:
        raise ValueError("too many lines")
    return lines


def _why(*, follow: bool) -> str:
    return "no longer kept, or this reader was too slow" if follow else "no longer kept"
