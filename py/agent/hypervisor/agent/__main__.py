"""hypervisor-agent: reads flags and configuration, runs the agent until SIGTERM or SIGINT."""

import asyncio
import os
import random
import resource
import signal
import sys
from pathlib import Path

import click
import structlog
import uvloop

from hypervisor.agent.app import run_agent
from hypervisor.agent.config import AgentSettings
from hypervisor.agent.console_holder import program as console_holder_program
from hypervisor.agent.fencing import guard as fencing_guard_program
from hypervisor.agent.simulated import run_simulated
from hypervisor.core import logging
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import HypervisorError, leaf_errors
from hypervisor.core.ids import new_id
from hypervisor.core.settings import SettingsError, environment_name, known_keys, load
from hypervisor.core.version import program_version
from hypervisor.ext import console_mux, stats_sampler

EXIT_FAILURE = 1
EXIT_USAGE = 2

_DEFAULT_CONFIG = Path("/etc/hypervisor/agent.yaml")
_log = structlog.get_logger(__name__)


_CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Configuration file. Default: {_DEFAULT_CONFIG}, if it exists.",
)
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, such as agent.port=0."
)


@click.group(invoke_without_command=True)
@click.version_option(program_version(), prog_name="hypervisor-agent")
@_CONFIG
@_SET
@click.option(
    "--simulated",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Run N nodes with the fake driver in this process: no root, no runtime, nothing real.",
)
@click.pass_context
def main(
    context: click.Context, config_path: Path | None, overrides: tuple[str, ...], simulated: int | None
) -> None:
    """The agent of one node: registers with the control plane and runs its instances."""
    context.obj = (config_path, overrides)
    if context.invoked_subcommand is None:
        context.exit(_run(_load(context, config_path, overrides), simulated))


@main.command(
    "console-holder",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    short_help="Hold the consoles of a node; started by the agent.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def console_holder(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Hold the consoles of a node while agents come and go. The agent starts it by itself."""
    context.exit(console_holder_program.main(arguments))


@main.command(
    "fencing-guard",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    short_help="Fence a node in its agent's place; started by the agent.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def fencing_guard(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Kill what must not run any more while the agent cannot. The agent starts it by itself."""
    context.exit(fencing_guard_program.main(arguments))


@main.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@_CONFIG
@_SET
@click.pass_context
def check(context: click.Context, config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Read the configuration, report every mistake in it, and exit."""
    outer_path, outer_overrides = context.obj
    _load(context, config_path or outer_path, (*outer_overrides, *overrides))
    click.echo("the configuration is good")


@config.command()
def keys() -> None:
    """List every key, its meaning and the environment variable that overrides it."""
    for key, field in known_keys(AgentSettings).items():
        click.echo(f"{key} ({environment_name(key)})\n    {field.description}")


def _load(context: click.Context, path: Path | None, overrides: tuple[str, ...]) -> AgentSettings:
    if path is None and _DEFAULT_CONFIG.exists():
        path = _DEFAULT_CONFIG
    try:
        return load(AgentSettings, path=path, environ=os.environ, overrides=overrides).settings
    except SettingsError as exc:
        click.echo(exc.message, err=True)
        context.exit(EXIT_USAGE)


def _run(settings: AgentSettings, simulated: int | None) -> int:
    logging.configure(program="hypervisor-agent", level=settings.log.level, format=settings.log.format)
    code = 0
    try:
        uvloop.run(_serve(settings, simulated))
    except* HypervisorError as group:
        for error in leaf_errors(group):
            _log.error("agent_failed", reason=error.reason, error=error.message)
        code = EXIT_FAILURE
    return code


async def _serve(settings: AgentSettings, simulated: int | None) -> None:
    stop = asyncio.Event()
    _allow_open_files()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    clock, rng, version = SystemClock(), random.SystemRandom(), program_version()
    _log.info(
        "agent_starting",
        version=version,
        stats_sampler=stats_sampler.implementation,
        console_mux=console_mux.implementation,
    )
    if simulated is None:
        await run_agent(settings, stop=stop, clock=clock, rng=rng, new_id=new_id, version=version)
    else:
        await run_simulated(
            settings, simulated, stop=stop, clock=clock, rng=rng, new_id=new_id, version=version
        )


def _allow_open_files() -> None:
    """As many as the system lets: some ten are kept open for each instance."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main(prog_name="hypervisor-agent"))
