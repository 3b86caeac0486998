"""``context``: list, use, set, delete, show."""

import json

import click

from hypervisor.ctl import settings
from hypervisor.ctl.display.details import labelled
from hypervisor.ctl.display.table import Column, render
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, formatted
from hypervisor.ctl.output import note, write

__all__ = ["context"]

_name = click.argument("name", type=NAME("context"))


@click.group()
def context() -> None:
    """Servers by name: address, TLS and token, in ~/.config/hypervisor/ctl.yaml (or HYPERVISOR_CTL_CONFIG)."""


def _load(invocation: Invocation) -> settings.Settings:
    return settings.load(settings.config_path(invocation.environ))


@context.command("list")
@formatted
@pass_invocation
def list_contexts(invocation: Invocation) -> None:
    """Show the contexts; the current one has a star."""
    known = _load(invocation)
    names = sorted(known.contexts)
    if invocation.quiet:
        for name in names:
            write(name)
        return
    if invocation.output in ("json", "yaml"):
        _write_document(
            invocation,
            [
                {"name": name, "current": name == known.current, **_public(known.contexts[name])}
                for name in names
            ],
        )
        return
    if not names:
        note(
            f"No contexts. Make one with 'hypervisor-ctl context set NAME --server HOST:PORT' ({known.path})."
        )
        return
    columns: list[Column[str]] = [
        Column("CURRENT", lambda name: "*" if name == known.current else " "),
        Column("NAME", lambda name: name),
        Column("SERVER", lambda name: known.contexts[name].server),
        Column("TLS", lambda name: "yes" if known.contexts[name].tls else "no"),
        Column(
            "TOKEN",
            lambda name: "yes" if known.contexts[name].token or known.contexts[name].token_file else "no",
        ),
    ]
    write("\n".join(render(columns, names, headers=invocation.headers)))


@context.command("use")
@_name
@pass_invocation
def use(invocation: Invocation, *, name: str) -> None:
    """Make a context the current one."""
    known = _load(invocation)
    known.context(name)
    settings.save(known._replace(current=name))
    note(f"Using context {name}.")


@context.command("set")
@_name
@click.option("--server", metavar="HOST:PORT[,...]", help="Addresses of the servers; any of them will do.")
@click.option("--token", metavar="TOKEN", help="Bearer token, kept in the file. Better: --token-file.")
@click.option("--token-file", metavar="FILE", help="File that holds the bearer token.")
@click.option("--tls/--no-tls", default=None, help="With or without TLS; the options below mean --tls.")
@click.option("--ca-file", metavar="FILE", help="Certificate authorities to trust. Default: the system's.")
@click.option("--cert-file", metavar="FILE", help="Own certificate, for servers that ask for one.")
@click.option("--key-file", metavar="FILE", help="Key of the own certificate.")
@click.option(
    "--server-name", metavar="NAME", help="Name in the server's certificate, where it is not the address."
)
@click.option("--use", "use_it", is_flag=True, help="Make it the current context.")
@pass_invocation
def set_context(
    invocation: Invocation,
    *,
    name: str,
    server: str | None,
    token: str | None,
    token_file: str | None,
    tls: bool | None,
    ca_file: str | None,
    cert_file: str | None,
    key_file: str | None,
    server_name: str | None,
    use_it: bool,
) -> None:
    """Make a context, or change what is given of one that exists. Relative paths are kept absolute."""
    known = _load(invocation)
    before = known.contexts.get(name)
    if before is None and not server:
        raise click.UsageError(f"context {name!r} is new: give --server HOST:PORT")
    files = {
        "ca_file": _absolute(ca_file),
        "cert_file": _absolute(cert_file),
        "key_file": _absolute(key_file),
    }
    given = {key: value for key, value in {**files, "server_name": server_name}.items() if value}
    if tls is False and given:
        raise click.UsageError("--no-tls excludes the options of TLS")
    kept = before.tls if before is not None else None
    wanted = None if tls is False else kept
    if given or tls:
        wanted = kept or settings.Tls()._replace(**given)
    if wanted is not None and (wanted.cert_file is None) != (wanted.key_file is None):
        raise click.UsageError("--cert-file and --key-file go together")
    made = settings.Context(
        server=server or (before.server if before is not None else ""),
        tls=wanted,
        token=token or (before.token if before is not None and not token_file else None),
        token_file=_absolute(token_file) or (before.token_file if before is not None and not token else None),
    )
    current = name if use_it or known.current is None else known.current
    settings.save(known._replace(current=current, contexts={**known.contexts, name: made}))
    note(
        f"Context {name} {'made' if before is None else 'changed'}{' and in use' if current == name else ''}."
    )


@context.command("delete")
@_name
@pass_invocation
def delete(invocation: Invocation, *, name: str) -> None:
    """Forget a context."""
    known = _load(invocation)
    known.context(name)
    rest = {key: value for key, value in known.contexts.items() if key != name}
    current = None if known.current == name else known.current
    settings.save(known._replace(current=current, contexts=rest))
    note(f"Context {name} deleted.")


@context.command("show")
@click.argument("name", type=NAME("context"), required=False)
@formatted
@pass_invocation
def show(invocation: Invocation, *, name: str | None) -> None:
    """Show a context, or what is in use now after options and environment were weighed. Tokens are not shown."""
    if name is not None:
        chosen = _load(invocation).context(name)
        shown = {"name": name, **_public(chosen)}
    else:
        connection = invocation.connection()
        used = settings.Context(server=connection.server, tls=connection.tls, token=connection.token)
        shown = {"name": connection.context or "", **_public(used)}
    if invocation.quiet:
        write(str(shown["name"]))
    elif invocation.output in ("json", "yaml"):
        _write_document(invocation, shown)
    else:
        write(labelled((key, str(value)) for key, value in shown.items()))


def _public(chosen: settings.Context) -> dict[str, object]:
    """The context as it may be shown: whether it has a token, not which."""
    shown: dict[str, object] = {"server": chosen.server, "tls": chosen.tls is not None}
    if chosen.tls is not None:
        shown |= {key: value for key, value in chosen.tls._asdict().items() if value is not None}
    shown["token"] = bool(chosen.token or chosen.token_file)
    if chosen.token_file:
        shown["token_file"] = chosen.token_file
    return shown


def _write_document(invocation: Invocation, document: object) -> None:
    if invocation.output == "json":
        write(json.dumps(document, indent=2))
        return
    import yaml

    write(yaml.safe_dump(document, sort_keys=False).rstrip("\n"))


def _absolute(path: str | None) -> str | None:
    if path is None:
        return None
    from pathlib import Path

    return str(Path(path).expanduser().absolute())
