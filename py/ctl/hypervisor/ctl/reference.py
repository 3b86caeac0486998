"""The reference of the command line, docs/guide/cli.md, made from the commands themselves.

``python -m hypervisor.ctl.reference > docs/guide/cli.md``; a test compares the file with what this prints.
"""

import sys
from collections.abc import Iterator

import click

from hypervisor.ctl.app import PROGRAM, cli
from hypervisor.ctl.failures import EXIT_CODES

__all__ = ["every_command", "reference"]

_WIDTH = 100
_HEAD = f"""\
# {PROGRAM}

<!-- Made by `python -m hypervisor.ctl.reference`: do not edit. -->

Everything `{PROGRAM} --help` says, on one page. Start with [getting-started.md](getting-started.md).

## Rules for all commands

- **Server**: `--server`, else `HYPERVISOR_SERVER`, else the context (`--context`, `HYPERVISOR_CONTEXT`, or the one in
  use), else `127.0.0.1:50051`. A server given by address is used without the TLS and the token of the current context.
- **Contexts** are kept in `~/.config/hypervisor/ctl.yaml` (below `XDG_CONFIG_HOME`; `HYPERVISOR_CTL_CONFIG` names
  another file), readable by its owner alone.
- **Output** goes to standard output, notes, progress and errors to standard error. `-o json` is the JSON mapping of
  protobuf with the field names of the `.proto` files: fields without presence are always there, 64-bit integers are
  strings, times are RFC 3339. A list is an array; what is watched is one event a line. Errors are then JSON as well.
- **Waiting**: commands that change something wait until it is done. `--no-wait` returns the operation at once,
  `--timeout` bounds the wait; the operation goes on either way and `operation wait ID` waits again.
- **Repeats are safe**: each change carries a fresh request id. Where a reply is lost, the command asks what became of
  its operation and reports that.
- **Lists** are complete: all pages are fetched, unless `--limit`. Filter and order are the server's.

## Exit codes

| code | meaning |
|---|---|
"""


def every_command() -> Iterator[tuple[str, ...]]:
    """The path of every command and group, the program itself first (an empty path)."""
    for path, _ in _walk(cli, ()):
        yield path


def _walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from _walk(child, (*path, name))


def _help(command: click.Command, path: tuple[str, ...]) -> str:
    context = click.Context(
        command,
        info_name=" ".join((PROGRAM, *path)),
        terminal_width=_WIDTH,
        max_content_width=_WIDTH,
        help_option_names=["-h", "--help"],
    )
    return command.get_help(context)


def reference() -> str:
    """The whole page."""
    lines = [_HEAD + "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()), ""]
    for path, command in _walk(cli, ()):
        lines += [f"{'#' * min(2 + max(0, len(path) - 1), 3)} {' '.join((PROGRAM, *path))}", ""]
        lines += ["```text", _help(command, path), "```", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
