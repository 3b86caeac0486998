"""What one run of the program knows: its global options, and the session once something needs it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from hypervisor.ctl.session import Deadline, Session
    from hypervisor.ctl.settings import Connection

__all__ = ["Invocation", "pass_invocation"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Invocation:
    """Filled in by the options (:mod:`hypervisor.ctl.options`) as they are parsed; handed to every command."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    server: str | None = None
    context: str | None = None
    token: str | None = None
    timeout_s: float | None = None
    output: str = "table"
    headers: bool = True
    quiet: bool = False
    _session: "Session | None" = None

    def connection(self) -> "Connection":
        """Where to connect, from flags, environment and configuration file."""
        from hypervisor.ctl import settings

        loaded = settings.load(settings.config_path(self.environ))
        return settings.resolve(
            loaded, server=self.server, context=self.context, token=self.token, environ=self.environ
        )

    def session(self) -> "Session":
        """The session of this run, made at first use and closed by :meth:`close`."""
        if self._session is None:
            from hypervisor.ctl.session import Session

            self._session = Session(self.connection())
        return self._session

    def deadline(self, default_s: float | None) -> "Deadline":
        """From ``--timeout``, or else the default of the command."""
        from hypervisor.ctl.session import Deadline

        return Deadline(default_s if self.timeout_s is None else self.timeout_s)

    def close(self) -> None:
        """Close the session, if there is one. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            session.close()


def pass_invocation(command: F) -> F:
    """Decorator: the :class:`Invocation` becomes the command's first argument."""
    decorated: F = click.make_pass_decorator(Invocation)(command)  # type: ignore[assignment]  # adds one argument
    return decorated
