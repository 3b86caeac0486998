"""The configuration file: named contexts, each the servers of a cluster with what is needed to talk to them.

``~/.config/hypervisor/ctl.yaml`` (below ``XDG_CONFIG_HOME`` where that is set), or the file that
``HYPERVISOR_CTL_CONFIG`` names::

    current: lab
    contexts:
      lab:
        server: [lab-1.example:50051, lab-2.example:50051]
        tls: {ca_file: /etc/hypervisor/ca.pem, cert_file: me.pem, key_file: me.key, server_name: lab}
        token_file: ~/.config/hypervisor/lab.token

Relative paths are relative to the file. YAML is imported only where the file exists. Values here are named tuples,
not dataclasses: those cost half a millisecond each at every start of the program (docs/decisions/0007).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from hypervisor.core.errors import FieldViolation, InvalidArgument, NotFound

__all__ = [
    "DEFAULT_SERVER",
    "Connection",
    "Context",
    "Settings",
    "Tls",
    "config_path",
    "load",
    "resolve",
    "save",
]

DEFAULT_SERVER = "127.0.0.1:50051"


class Tls(NamedTuple):
    """Files in PEM format. ``ca_file`` None: the system's authorities; ``cert_file`` and ``key_file`` go together."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    """Name expected in the server's certificate, where it differs from the address."""


class Context(NamedTuple):
    """A cluster. ``server``: its servers, ``HOST:PORT`` separated by commas.

    ``tls`` None: without encryption, for loopback and trusted networks only.
    """

    server: str
    tls: Tls | None = None
    token: str | None = None
    token_file: str | None = None


class Settings(NamedTuple):
    """The whole file; an absent file is an empty one."""

    path: Path
    current: str | None = None
    contexts: Mapping[str, Context] = MappingProxyType({})

    def context(self, name: str) -> Context:
        """The context of that name. NotFound (CONTEXT_NOT_FOUND) lists those there are."""
        if name not in self.contexts:
            known = ", ".join(sorted(self.contexts)) or "none"
            raise NotFound(
                f"there is no context {name!r} in {self.path} (known: {known}): make it with "
                f"'hypervisor-ctl context set {name} --server HOST:PORT'",
                reason="CONTEXT_NOT_FOUND",
                metadata={"context": name, "path": str(self.path)},
            )
        return self.contexts[name]


class Connection(NamedTuple):
    """Where to and how, after flags, environment and contexts have been weighed. ``server``: one or several addresses,
    separated by commas."""

    server: str
    tls: Tls | None
    token: str | None
    context: str | None
    """The context it came from; None for an address given directly, or the default one."""

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses, in the order in which they are tried."""
        return tuple(filter(None, (address.strip() for address in self.server.split(",")))) or (self.server,)


def config_path(environ: Mapping[str, str]) -> Path:
    """Where the file is, whether or not it exists."""
    given = environ.get("HYPERVISOR_CTL_CONFIG")
    if given:
        return Path(given).expanduser()
    base = environ.get("XDG_CONFIG_HOME")
    directory = Path(base) if base else Path(environ.get("HOME", "/")) / ".config"
    return directory / "hypervisor" / "ctl.yaml"


def load(path: Path) -> Settings:
    """Read the file. InvalidArgument (CONFIG_INVALID) names every wrong key at once."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Settings(path)
    except (OSError, UnicodeDecodeError) as exc:
        raise _invalid(path, (FieldViolation("", f"cannot be read: {exc}"),)) from exc
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = f"{where}not valid YAML: {getattr(exc, 'problem', None) or exc}"
        raise _invalid(path, (FieldViolation("", problem),)) from exc
    reader = _Reader()
    settings = reader.settings({} if document is None else document, path)
    if reader.problems:
        raise _invalid(path, tuple(reader.problems))
    return settings


def save(settings: Settings) -> None:
    """Write the file, readable by its owner alone, in one step (a reader sees the old or the new one)."""
    import yaml

    document: dict[str, Any] = {"current": settings.current} if settings.current else {}
    document["contexts"] = {name: _plain(context) for name, context in sorted(settings.contexts.items())}
    settings.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = settings.path.with_name(f".{settings.path.name}.{os.getpid()}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yaml.safe_dump(document, file, sort_keys=False)
        scratch.replace(settings.path)
    finally:
        scratch.unlink(missing_ok=True)


def resolve(
    settings: Settings,
    *,
    server: str | None,
    context: str | None,
    token: str | None,
    environ: Mapping[str, str],
) -> Connection:
    """The connection to use: flags, then environment, then the context (named or current), then the default.

    A server given by flag or HYPERVISOR_SERVER is taken as it is, without the TLS and token of the current context
    (which belong to another server) unless a context is named as well.
    """
    server = server or environ.get("HYPERVISOR_SERVER") or None
    token = token or environ.get("HYPERVISOR_TOKEN") or None
    context = context or environ.get("HYPERVISOR_CONTEXT") or None
    name = context or (None if server else settings.current)
    if name is None:
        return Connection(server=server or DEFAULT_SERVER, tls=None, token=token, context=None)
    chosen = settings.context(name)
    base = settings.path.parent
    if token is None and chosen.token_file:
        token = _read_token(base / Path(chosen.token_file).expanduser())
    tls = chosen.tls
    if tls is not None:
        tls = tls._replace(
            **{
                key: str(base / Path(value).expanduser())
                for key in ("ca_file", "cert_file", "key_file")
                if (value := getattr(tls, key)) is not None
            },
        )
    return Connection(server=server or chosen.server, tls=tls, token=token or chosen.token, context=name)


def _read_token(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidArgument.of_field(
            "token_file", f"{path} cannot be read: {exc}", reason="CONFIG_INVALID"
        ) from exc


def _invalid(path: Path, problems: tuple[FieldViolation, ...]) -> InvalidArgument:
    text = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in problems)
    return InvalidArgument(
        f"{path}: {text}", reason="CONFIG_INVALID", metadata={"path": str(path)}, violations=problems
    )


def _plain(context: Context) -> dict[str, Any]:
    document: dict[str, Any] = {"server": context.server}
    if context.tls is not None:
        document["tls"] = {key: value for key, value in context.tls._asdict().items() if value is not None}
    for key in ("token", "token_file"):
        if getattr(context, key) is not None:
            document[key] = getattr(context, key)
    return document


class _Reader:
    """Turns the document into values and collects what is wrong with it."""

    def __init__(self) -> None:
        self.problems: list[FieldViolation] = []

    def settings(self, document: Any, path: Path) -> Settings:
        top = self._mapping("", document, ("current", "contexts"))
        contexts = top.get("contexts")
        named = contexts if isinstance(contexts, dict) else {}
        if contexts is not None and not isinstance(contexts, dict):
            self._wrong("contexts", "must be a mapping of name to context")
        return Settings(
            path,
            current=self._text("current", top.get("current")),
            contexts={str(name): self._context(f"contexts.{name}", value) for name, value in named.items()},
        )

    def _context(self, where: str, document: Any) -> Context:
        keys = self._mapping(where, document, ("server", "tls", "token", "token_file"))
        tls: Tls | None = None
        if keys.get("tls") is not None:
            files = self._mapping(f"{where}.tls", keys["tls"], Tls._fields)
            tls = Tls(**{key: self._text(f"{where}.tls.{key}", value) for key, value in files.items()})
            if (tls.cert_file is None) != (tls.key_file is None):
                self._wrong(f"{where}.tls", "cert_file and key_file go together: give both or neither")
        given = keys.get("server")
        if isinstance(given, list) and all(isinstance(address, str) for address in given):
            given = ",".join(given)
        server = self._text(f"{where}.server", given)
        if not server:
            self._wrong(f"{where}.server", "is required: give HOST:PORT")
        return Context(
            server=server or "",
            tls=tls,
            token=self._text(f"{where}.token", keys.get("token")),
            token_file=self._text(f"{where}.token_file", keys.get("token_file")),
        )

    def _mapping(self, where: str, document: Any, known: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(document, dict):
            self._wrong(where, f"must be a mapping with the keys {', '.join(known)}")
            return {}
        for key in document:
            if key not in known:
                import difflib

                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                self._wrong(f"{where}.{key}".lstrip("."), f"is not a known key: {hint}")
        return {key: value for key, value in document.items() if key in known}

    def _text(self, where: str, value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        self._wrong(where, f"must be text, not {type(value).__name__}")
        return None

    def _wrong(self, where: str, description: str) -> None:
        self.problems.append(FieldViolation(where, description))
