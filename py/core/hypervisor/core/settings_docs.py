"""The reference of all configuration keys, docs/guide/configuration.md, made from the settings themselves.

``python -m hypervisor.core.settings_docs hypervisor.server.config:ServerSettings hypervisor.agent.config:AgentSettings
> docs/guide/configuration.md``; a test compares the file with what this prints. Core knows no program: their settings
are named on the command line.
"""

import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from hypervisor.core.settings import Section, Settings, environment_name, known_keys

__all__ = ["reference"]

_INTRODUCTION = """\
# Configuration

<!-- Made from the settings of the programs by hypervisor.core.settings_docs. Do not edit: a test compares it. -->

`hypervisor-server` and `hypervisor-agent` read a YAML file (`--config FILE`; without it
`/etc/hypervisor/server.yaml` or `agent.yaml`, if it exists). Every key has a default and can be overridden, later wins:

1. the file: sections with keys;
2. the environment: `HYPERVISOR_<SECTION>__<KEY>`, such as `HYPERVISOR_SERVER__GRPC_ADDRESS=127.0.0.1:50051`;
3. flags: `--set server.grpc_address=127.0.0.1:50051`, any number of them.

In variables and flags a list is written `a,b` and a map `k=v,k2=v2`; `--set node.labels.disk=ssd` sets one entry.
Durations have a unit (`250ms`, `30s`, `1m30s`, `12h`, `7d`), sizes may have one (`64KiB`, `16MiB`, `1GiB`; without it
they are bytes).

Unknown keys are errors that name the nearest known one. All problems are told at once, each with the file and line, the
variable or the flag it came from; the program then does not start (exit code 2). `config check` of either program
does just that, `config keys` lists the keys, and `hypervisor-server config show` prints what is in effect and where it
came from.
"""


def reference(programs: Iterable[type[Settings]]) -> str:
    """The whole page, for these programs in this order."""
    parts = [_INTRODUCTION]
    for model in programs:
        parts.append(f"\n## {_first_line(model)}\n")
        defaults = _flat(model().model_dump(mode="json"), known_keys(model))
        for name, field in model.model_fields.items():
            section = field.annotation
            assert isinstance(section, type)
            assert issubclass(section, Section)
            parts.append(
                f"\n### {name}\n{_first_line(section)}\n\n| key | default | meaning |\n|---|---|---|\n"
            )
            for key, about in known_keys(section, f"{name}.").items():
                shown = f"`{defaults[key]}`" if defaults[key] else ""
                parts.append(
                    f"| `{key}`<br>`{environment_name(key)}` | {shown} | {about.description or ''} |\n"
                )
    return "".join(parts)


def _first_line(model: type[Section]) -> str:
    return (model.__doc__ or model.__name__).strip().splitlines()[0].rstrip(".")


def _flat(tree: dict[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """Each key's value as it is written in YAML; empty where there is none."""
    found = {}
    for key in keys:
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        empty = value is None or value in ("", [], {})
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        found[key] = "" if empty else text
    return found


def _load(name: str) -> type[Settings]:
    module, _, attribute = name.partition(":")
    model = getattr(importlib.import_module(module), attribute)
    assert isinstance(model, type)
    assert issubclass(model, Settings)
    return model


def main(names: Sequence[str]) -> None:
    """Print the page for the settings named ``module:Class``."""
    sys.stdout.write(reference(map(_load, names)))


if __name__ == "__main__":
    main(sys.argv[1:])
