"""Options that many commands share, declared once: connection, output, waiting, listing."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.invocation import Invocation
from hypervisor.ctl.quantities import duration_s

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = [
    "DURATION",
    "NAME",
    "OUTPUTS",
    "connected",
    "formatted",
    "listed",
    "project_option",
    "quietly",
    "waiting",
    "watchable",
]

F = TypeVar("F", bound=Callable[..., Any])
OUTPUTS = ("table", "wide", "json", "yaml")


class Duration(click.ParamType[float]):
    """``30s``, ``1m30s``, a number of seconds; the value is a float of seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return duration_s(param.opts[-1] if param is not None else "duration", value)
        except InvalidArgument as exc:
            self.fail(exc.violations[0].description, param, ctx)


class Name(click.ParamType[str]):
    """Name or id of an object; completes from the server where one answers quickly."""

    def __init__(self, kind: str) -> None:
        self.name = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from hypervisor.ctl.completing import names

        return [CompletionItem(name) for name in names(ctx, self.name, incomplete)]


DURATION = Duration()


def NAME(kind: str) -> Name:  # noqa: N802  # stands where click has INT and STRING
    """The type of an argument that names an ``instance``, ``image``, ``node``, ``operation`` or ``context``."""
    return Name(kind)


def _keep(attribute: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        invocation = ctx.ensure_object(Invocation)
        if value is not None:
            setattr(invocation, attribute, value)

    return callback


def _set_when_given(attribute: str, *, value: bool) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        invocation = ctx.ensure_object(Invocation)
        if given:
            setattr(invocation, attribute, value)

    return callback


def _apply(command: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def connected(command: F) -> F:
    """Options of everything that talks to a server."""
    return _apply(
        command,
        [
            click.option(
                "--server",
                metavar="HOST:PORT[,...]",
                expose_value=False,
                callback=_keep("server"),
                help="Servers to talk to, separated by commas, in place of the context's (HYPERVISOR_SERVER).",
            ),
            click.option(
                "--context",
                metavar="NAME",
                type=NAME("context"),
                expose_value=False,
                callback=_keep("context"),
                help="Context of the configuration file to use (HYPERVISOR_CONTEXT).",
            ),
            click.option(
                "--token",
                metavar="TOKEN",
                expose_value=False,
                callback=_keep("token"),
                help="Bearer token (HYPERVISOR_TOKEN, which other users of the machine cannot see).",
            ),
            click.option(
                "--timeout",
                type=DURATION,
                metavar="DURATION",
                expose_value=False,
                callback=_keep("timeout_s"),
                help="Give up after this long, such as 30s or 5m.",
            ),
        ],
    )


def formatted(command: F) -> F:
    """Options of everything that shows objects."""
    return _apply(
        command,
        [
            click.option(
                "-o",
                "--output",
                type=click.Choice(OUTPUTS),
                is_eager=True,
                expose_value=False,
                callback=_keep("output"),
                help="Form of the answer, and of errors with json. Default: table.",
            ),
            click.option(
                "--no-headers",
                is_flag=True,
                expose_value=False,
                callback=_set_when_given("headers", value=False),
                help="Tables without their first line.",
            ),
            quietly,
        ],
    )


def quietly(command: F) -> F:
    """``-q``: names only."""
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_when_given("quiet", value=True),
        help="Names only, one a line (ids, for operations).",
    )(command)


def listed(command: F) -> F:
    """Options of lists; filter and order are the server's."""
    return _apply(
        command,
        [
            click.option(
                "--filter",
                "filters",
                metavar="CONDITION",
                multiple=True,
                help="Only those that match: field=value or field!=value; several, or separated by commas, must "
                "all hold.",
            ),
            click.option(
                "--sort", metavar="FIELD", help="Order by this field; 'FIELD desc' for the other way round."
            ),
            click.option(
                "--limit",
                type=click.IntRange(min=1),
                metavar="N",
                help="At most so many. Default: all, page by page.",
            ),
        ],
    )


def watchable(command: F) -> F:
    """``--watch``."""
    return click.option(
        "-w",
        "--watch",
        is_flag=True,
        help="Go on showing changes: redrawn on a terminal, a line for each change elsewhere.",
    )(command)


def waiting(command: F) -> F:
    """``--wait`` and ``--no-wait``."""
    return click.option(
        "--wait/--no-wait",
        "wait",
        default=True,
        help="Wait until it is done (the default), or return as soon as it is recorded.",
    )(command)


def project_option(command: F) -> F:
    """``--project``."""
    return click.option(
        "-p",
        "--project",
        metavar="PROJECT",
        default="",
        help="Project of the instance or image. Default: 'default'.",
    )(command)
