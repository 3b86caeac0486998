"""A click group whose commands are imported when they run, not when the program starts or shows its help."""

import importlib
from collections.abc import Mapping
from typing import NamedTuple

import click

__all__ = ["LazyGroup", "Place"]


class Place(NamedTuple):
    """Where a command is (``module:attribute`` below hypervisor.ctl.commands) and its line in the help."""

    target: str
    summary: str


class LazyGroup(click.Group):
    """Give ``places``: name -> Place. A mistyped command is answered with the nearest one."""

    def __init__(self, *args: object, places: Mapping[str, Place], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # handed through
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = self._places.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.target.partition(":")
        command = getattr(importlib.import_module(f"hypervisor.ctl.commands.{module}"), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{place.target} is no command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._places and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], list(self._places), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(self._places)}"
            ctx.fail(f"there is no command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.summary) for name, place in self._places.items()])
