"""``instance console``."""

import contextlib
import os
import sys
from pathlib import Path

import click

from hypervisor.core.errors import Unavailable
from hypervisor.ctl import quantities
from hypervisor.ctl.console.attach import End, Ending, Request, attach
from hypervisor.ctl.console.escape import describe_escape, parse_escape
from hypervisor.ctl.console.recording import Recorder
from hypervisor.ctl.console.since import parse_since
from hypervisor.ctl.console.terminal import Ended, raw_mode, size_of
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import DURATION, NAME, connected, project_option, quietly
from hypervisor.ctl.output import note

__all__ = ["console"]


@click.command("console")
@click.argument("instance", type=NAME("instance"))
@click.option("--read-only", is_flag=True, help="Only look: nothing typed is sent, and the size stays.")
@click.option(
    "--replay",
    metavar="SIZE",
    help="Past output to show first: all that is kept (the default), none, or a size such as 16KiB.",
)
@click.option(
    "--since",
    metavar="WHEN",
    help="Past output to show first, from then on: 5m (so far back), a time such as 2026-01-31T12:00Z, or @POSITION.",
)
@click.option(
    "--escape",
    metavar="KEY",
    default="^]",
    help="Key that leaves the console: ^] (the default) is Ctrl-]; none: no key does.",
)
@click.option(
    "--until-idle",
    type=DURATION,
    metavar="DURATION",
    help="Where the input is no terminal: end once it has ended and nothing came for this long.",
)
@click.option(
    "--size",
    metavar="COLUMNSxROWS",
    help="Size to tell the instance, such as 100x30. Default: that of the terminal, if there is one.",
)
@click.option(
    "--fixed-size",
    is_flag=True,
    help="Keep that size while attached, whatever the windows of other viewers are.",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Record what is shown as an asciicast (version 2) in a new file, for 'asciinema play'. What is typed is not "
    "recorded.",
)
@project_option
@quietly
@connected
@pass_invocation
def console(
    invocation: Invocation,
    *,
    instance: str,
    read_only: bool,
    replay: str | None,
    since: str | None,
    escape: str,
    until_idle: float | None,
    size: str | None,
    fixed_size: bool,
    record: Path | None,
    project: str,
) -> None:
    """Attach to the terminal of an instance. Ctrl-] leaves it; the instance goes on.

    On a terminal, keys go to the instance as they are typed (Ctrl-C too) and it learns the size of the window, also
    when that changes. Any number of people may be attached to one instance.

    In a pipe, what comes in is typed, what the instance prints goes out as it is, and the end of the input does not
    end the command: it goes on until the console closes, or, with --until-idle, until nothing comes any more.
    """
    key = parse_escape(escape)
    if since is not None and replay is not None:
        raise click.UsageError("--since and --replay do not go together")
    replay_bytes = quantities.replay_bytes("--replay", "all" if replay is None else replay)
    keyboard = sys.stdin.fileno()
    on_terminal = os.isatty(keyboard)
    if on_terminal and until_idle is not None and not read_only:
        raise click.UsageError("--until-idle is for input that ends: it does not go with a keyboard")
    screen = next((fd for fd in (sys.stdout.fileno(), keyboard) if size_of(fd) is not None), None)
    # A keyboard is read even with --read-only, for the escape alone.
    wanted = None if size is None else quantities.columns_and_rows("--size", size)
    if fixed_size and wanted is None and screen is None:
        raise click.UsageError("--fixed-size needs a size: there is no terminal, so give --size")
    recorder = _recorder(record, instance, wanted or (None if screen is None else size_of(screen)))
    request = Request(
        instance=instance,
        project=project,
        read_only=read_only,
        replay_bytes=replay_bytes,
        input=keyboard if on_terminal or not read_only else None,
        output=sys.stdout.fileno(),
        terminal=screen,
        size=wanted,
        since=None if since is None else parse_since("--since", since),
        fixed_size=fixed_size and not read_only,
        recorder=recorder,
        escape=key if on_terminal else b"",
        until_idle_s=until_idle,
        greeting=_greeting(instance, key) if on_terminal and not invocation.quiet else "",
    )
    session = invocation.session()
    # In raw mode a line break alone does not return to the first column.
    line_end = "\r\n" if on_terminal else "\n"

    def say(text: str) -> None:
        sys.stderr.write(f"{text}{line_end}")
        sys.stderr.flush()

    try:
        with raw_mode(keyboard, request.output) if on_terminal else contextlib.nullcontext():
            ending = attach(session, request, say=say)
    except Ended as exc:
        raise click.exceptions.Exit(128 + exc.number) from exc
    finally:
        if recorder is not None:
            recorder.close()
    _tell(invocation, instance, ending, on_terminal=on_terminal)


def _recorder(path: Path | None, instance: str, size: tuple[int, int] | None) -> Recorder | None:
    return None if path is None else Recorder(path, size=size, title=f"console of {instance}")


def _greeting(instance: str, escape: bytes) -> str:
    leave = describe_escape(escape)
    return f"Attached to {instance}{f': {leave} leaves' if leave else ''}."


def _tell(invocation: Invocation, instance: str, ending: Ending, *, on_terminal: bool) -> None:
    if ending.end is End.CLOSED and ending.reason == "DETACHED":
        raise Unavailable(
            f"the node of {instance} let its viewers go; the instance may still run: attach again",
            reason="CONSOLE_DETACHED",
            metadata={"instance": instance},
        )
    if invocation.quiet or (ending.end is End.IDLE):
        return
    if on_terminal:
        sys.stderr.write("\n")
    if ending.end is End.ESCAPE:
        note(f"Left {instance}; it goes on.")
    elif ending.reason == "DELETED":
        note(f"Console closed: {instance} was deleted.")
    else:
        code = "" if ending.exit_code is None else f" with exit code {ending.exit_code}"
        note(f"Console closed: {instance} ended{code}.")
