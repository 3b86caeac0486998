"""hypervisor-server: reads flags and configuration, serves until SIGTERM or SIGINT."""

import asyncio
import gc
import os
import random
import signal
import sys
from pathlib import Path

import click
import structlog
import uvloop
import yaml

from hypervisor.core import logging
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import HypervisorError, leaf_errors
from hypervisor.core.ids import new_id
from hypervisor.core.settings import Loaded, SettingsError, environment_name, known_keys, load
from hypervisor.core.version import program_version
from hypervisor.server.app import run_server
from hypervisor.server.config import ServerSettings

EXIT_FAILURE = 1
EXIT_USAGE = 2

_DEFAULT_CONFIG = Path("/etc/hypervisor/server.yaml")
_log = structlog.get_logger(__name__)

_CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Configuration file. Default: {_DEFAULT_CONFIG}, if it exists.",
)
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key, such as server.grpc_address=127.0.0.1:0.",
)


@click.group(invoke_without_command=True)
@click.version_option(program_version(), prog_name="hypervisor-server")
@_CONFIG
@_SET
@click.pass_context
def main(context: click.Context, config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """The control plane of a Hypervisor cluster: gRPC API, scheduler, operations, health and metrics."""
    context.obj = (config_path, overrides)
    if context.invoked_subcommand is None:
        context.exit(_run(_load(context, config_path, overrides).settings))


@main.command()
def version() -> None:
    """Show the version."""
    click.echo(program_version())


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
@_CONFIG
@_SET
@click.pass_context
def show(context: click.Context, config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Show the configuration in effect as YAML, and where each key that is not a default came from."""
    outer_path, outer_overrides = context.obj
    loaded = _load(context, config_path or outer_path, (*outer_overrides, *overrides))
    click.echo(yaml.safe_dump(loaded.settings.model_dump(mode="json"), sort_keys=False), nl=False)
    for key, origin in loaded.origins.items():
        click.echo(f"# {key}: {origin}")


@config.command()
def keys() -> None:
    """List every key, its meaning and the environment variable that overrides it."""
    for key, field in known_keys(ServerSettings).items():
        click.echo(f"{key} ({environment_name(key)})\n    {field.description}")


def _load(context: click.Context, path: Path | None, overrides: tuple[str, ...]) -> Loaded[ServerSettings]:
    if path is None and _DEFAULT_CONFIG.exists():
        path = _DEFAULT_CONFIG
    try:
        return load(ServerSettings, path=path, environ=os.environ, overrides=overrides)
    except SettingsError as exc:
        click.echo(exc.message, err=True)
        context.exit(EXIT_USAGE)


def _run(settings: ServerSettings) -> int:
    logging.configure(program="hypervisor-server", level=settings.log.level, format=settings.log.format)
    code = 0
    try:
        uvloop.run(_serve(settings))
    except* HypervisorError as group:
        for error in leaf_errors(group):
            _log.error("server_failed", reason=error.reason, error=error.message)
        code = EXIT_FAILURE
    return code


async def _serve(settings: ServerSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run_server(
        settings,
        stop=stop,
        clock=SystemClock(),
        rng=random.SystemRandom(),
        new_id=new_id,
        version=program_version(),
        started=lambda _: _tune_collector(),
    )


def _tune_collector() -> None:
    """Leave what start-up made alone, and look for cycles less often: calls make few, and looking costs all of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


if __name__ == "__main__":
    sys.exit(main(prog_name="hypervisor-server"))
