"""The console holder as a program: ``hypervisor-agent console-holder``. The agent starts it; nobody else needs to.

It is in a session of its own and outlives the agent, also one that is killed, so that what guests print meanwhile is
read and kept. It ends by itself when no agent is connected and no guest has its output open.
"""

import argparse
import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog
import uvloop

from hypervisor.agent.console_holder.launching import LOGS, listen
from hypervisor.agent.console_holder.server import HolderServer
from hypervisor.core import logging
from hypervisor.core.logging import LogFormat, LogLevel
from hypervisor.ext import console_mux

__all__ = ["IDLE_S", "main"]

IDLE_S = 10.0
"""How long it stays with no agent and nothing live."""

_log = structlog.get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until it is over; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hypervisor-agent console-holder", description=__doc__)
    parser.add_argument(
        "--socket", type=Path, required=True, help="unix socket, in the agent's data directory"
    )
    parser.add_argument("--listen-fd", type=int, help="descriptor that listens on it already")
    parser.add_argument("--idle", type=float, default=IDLE_S, help="seconds to stay with nothing to hold")
    options = parser.parse_args(arguments)
    logging.configure(program="hypervisor-console-holder", level=LogLevel.INFO, format=LogFormat.JSON)
    # Several descriptors for each console and viewer.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with _listener(options.socket, options.listen_fd) as listener:
        uvloop.run(_serve(listener, options.socket.parent / LOGS, idle_s=options.idle))
    return 0


async def _serve(listener: socket.socket, logs: Path, *, idle_s: float) -> None:
    server = HolderServer(logs, idle_s=idle_s)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.stop)
    for number in (signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: None)
    _log.info("console_holder_starting", console_mux=console_mux.implementation)
    await server.run(listener)
    _log.info("console_holder_stopped")


def _listener(path: Path, descriptor: int | None) -> socket.socket:
    if descriptor is not None:
        return socket.socket(fileno=descriptor)
    return listen(path)


if __name__ == "__main__":
    sys.exit(main())
