"""The one configuration loader: a YAML file, environment variables and flags become one frozen value.

A program declares its keys as a tree of :class:`Section` (documented fields, defaults), its root a
:class:`Settings`. :func:`load` merges, later wins: defaults, the file, ``HYPERVISOR_<SECTION>__<KEY>``
variables, ``--set section.key=value`` flags. Every wrong or unknown key is reported at once, with the file and
line, the variable or the flag it came from. ``settings_docs.py`` makes the reference and the example files from
the same tree.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo

from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.core.units import format_bytes, format_duration, parse_bytes, parse_duration

__all__ = [
    "Address",
    "ByteSize",
    "Duration",
    "Loaded",
    "Section",
    "Settings",
    "SettingsError",
    "environment_name",
    "known_keys",
    "load",
    "split_address",
]

ENVIRONMENT_PREFIX = "HYPERVISOR_"


class SettingsError(InvalidArgument):
    """The configuration is wrong. One line for each problem; ``violations`` has the same by key."""

    default_reason = "SETTINGS_INVALID"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:50051``, ``[::1]:50051`` or ``name:50051``; ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise ValueError("give host:port, such as 127.0.0.1:50051 or [::1]:50051")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"the port {shorten(port, 12)} is not a number from 0 to 65535")
    return (host[1:-1] if bracketed else host), int(port)


def _check_address(address: str) -> str:
    split_address(address)
    return address


Duration = Annotated[
    float,
    pydantic.BeforeValidator(parse_duration),
    pydantic.PlainSerializer(format_duration, return_type=str),
]
"""Seconds; written ``30s``, ``1m30s``, ``250ms``."""
ByteSize = Annotated[
    int, pydantic.BeforeValidator(parse_bytes), pydantic.PlainSerializer(format_bytes, return_type=str)
]
"""Bytes; written ``64KiB``, ``16MiB``."""
Address = Annotated[str, pydantic.AfterValidator(_check_address)]
"""``host:port``; port 0 lets the system choose where it is listened on."""


class Section(pydantic.BaseModel):
    """A group of keys. Declare each with ``pydantic.Field(default=..., description=...)``."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, coerce_numbers_to_str=True
    )


class Settings(Section):
    """All keys of one program."""

    foreign_sections: ClassVar[frozenset[str]] = frozenset()
    """Sections of other programs, whose variables may stand in the same environment and are left alone."""


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """The settings, and where each key that is not a default came from (``server.yaml:3``, a variable ...)."""

    settings: S
    origins: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Given:
    """One value somebody gave for one key."""

    path: tuple[str, ...]
    value: object
    origin: str


def environment_name(key: str) -> str:
    """The variable that overrides a key: ``server.grpc_address`` -> ``HYPERVISOR_SERVER__GRPC_ADDRESS``."""
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "__")


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def known_keys(model: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """All keys of a tree by dotted name, in the order declared."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section is None:
            found[prefix + name] = field
        else:
            found.update(known_keys(section, f"{prefix}{name}."))
    return found


def _collection(field: FieldInfo) -> type | None:
    """``list`` or ``dict`` for keys that hold several values, else None."""
    kinds: Sequence[Any] = (field.annotation,)
    if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
        kinds = typing.get_args(field.annotation)
    for kind in kinds:
        origin = typing.get_origin(kind)
        if origin in (list, tuple, frozenset, set):
            return list
        if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
            return dict
    return None


def _from_text(model: type[Settings], path: tuple[str, ...], text: str) -> object:
    """The value a variable or flag means: lists and maps are written ``a,b`` and ``k=v,k2=v2``."""
    field = known_keys(model).get(".".join(path))
    kind = None if field is None else _collection(field)
    items = [item.strip() for item in text.split(",") if item.strip()]
    if kind is list:
        return items
    if kind is dict:
        return {key.strip(): value.strip() for key, _, value in (item.partition("=") for item in items)}
    return text


class _FileReader:
    """Turns a YAML document into values with the line of each."""

    def __init__(self, path: Path, leaves: Mapping[str, FieldInfo]) -> None:
        self._path = path
        self._leaves = leaves
        self.given: list[_Given] = []
        self.problems: list[tuple[str, FieldViolation]] = []

    def read(self) -> None:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
            raise SettingsError(
                f"the configuration file {self._path} cannot be read: {reason}",
                metadata={"path": str(self._path)},
            ) from exc
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is not None:
                self._walk(loader, root, ())
        except yaml.YAMLError as exc:
            mark = getattr(exc, "problem_mark", None)
            where = f"{self._path}:{mark.line + 1}" if mark is not None else str(self._path)
            problem = getattr(exc, "problem", None) or str(exc)
            raise SettingsError(
                f"{where}: not valid YAML: {problem}", metadata={"path": str(self._path)}
            ) from exc
        finally:
            loader.dispose()

    def _walk(self, loader: yaml.SafeLoader, node: yaml.Node, path: tuple[str, ...]) -> None:
        origin = f"{self._path}:{node.start_mark.line + 1}"
        key = ".".join(path)
        if isinstance(node, yaml.MappingNode) and key not in self._leaves:
            seen: set[str] = set()
            for key_node, value_node in node.value:
                name = str(loader.construct_object(key_node, deep=True))
                if name in seen:
                    where = f"{self._path}:{key_node.start_mark.line + 1}"
                    again = ".".join((*path, name))
                    self.problems.append((where, FieldViolation(again, "is given twice: remove one")))
                seen.add(name)
                self._walk(loader, value_node, (*path, name))
            return
        value = loader.construct_object(node, deep=True)
        section_left_empty = value is None and any(k.startswith(key + ".") for k in self._leaves)
        if path and not section_left_empty:
            self.given.append(_Given(path, value, origin))
        elif not path and value is not None:
            self.problems.append(
                (origin, FieldViolation("", "the file must hold sections with keys, such as server: ..."))
            )


def _given_by_environment(model: type[Settings], environ: Mapping[str, str]) -> list[_Given]:
    found = []
    for name, text in sorted(environ.items()):
        path = tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
        if not name.startswith(ENVIRONMENT_PREFIX) or len(path) < 2 or path[0] in model.foreign_sections:
            continue
        found.append(_Given(path, _from_text(model, path, text), f"environment variable {name}"))
    return found


def _given_by_flags(model: type[Settings], overrides: Sequence[str]) -> list[_Given]:
    found = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or len(path) < 2 or not all(path):
            raise SettingsError(f"--set {shorten(text)}: write --set section.key=value")
        found.append(_Given(path, _from_text(model, path, value), f"--set {key}"))
    return found


def _merge(given: Sequence[_Given]) -> tuple[dict[str, Any], dict[str, str]]:
    """One tree of values (later wins) and the origin of each."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for item in given:
        place = tree
        for part in item.path[:-1]:
            below = place.get(part)
            if not isinstance(below, dict):
                below = place[part] = {}
            place = below
        place[item.path[-1]] = item.value
        origins[".".join(item.path)] = item.origin
    return tree, origins


def _nearest(key: str, known: Sequence[str]) -> str:
    if "." not in key:
        known = sorted({k.partition(".")[0] for k in known})
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        last = key.rpartition(".")[2]
        close = [k for k in known if k.rpartition(".")[2] == last][:1]
    return f"is not a known key; did you mean {close[0]}?" if close else "is not a known key: remove it"


def _origin_of(path: tuple[str, ...], origins: Mapping[str, str]) -> str:
    for length in range(len(path), 0, -1):
        origin = origins.get(".".join(path[:length]))
        if origin is not None:
            return origin
    prefix = ".".join(path) + "." if path else ""
    below = [origin for key, origin in origins.items() if key.startswith(prefix)]
    return below[-1] if below else "defaults"


def _problems_of(
    error: pydantic.ValidationError, known: Sequence[str], origins: Mapping[str, str]
) -> list[tuple[str, FieldViolation]]:
    found = []
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"])
        key = ".".join(path)
        if item["type"] == "extra_forbidden":
            text = _nearest(key, known)
        elif item["type"] in ("tuple_type", "list_type"):
            text = "give a list, such as [a, b]"
        elif item["type"] in ("model_type", "model_attributes_type"):
            text = f"is a section: put its keys under it ({key}.<key>)"
        else:
            text = item["msg"].removeprefix("Value error, ")
            text = text[0].lower() + text[1:] if text.startswith("Input should") else text
        found.append((_origin_of(path, origins), FieldViolation(key, text)))
    return found


def load(
    model: type[S],
    *,
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
) -> Loaded[S]:
    """The settings of a program; pure but for reading ``path`` (None: no file).

    Raises :class:`SettingsError` that lists every problem, one a line.
    """
    leaves = known_keys(model)
    given: list[_Given] = []
    problems: list[tuple[str, FieldViolation]] = []
    if path is not None:
        reader = _FileReader(path, leaves)
        reader.read()
        given, problems = reader.given, reader.problems
    given = [*given, *_given_by_environment(model, environ), *_given_by_flags(model, overrides)]
    tree, origins = _merge(given)
    settings: S | None = None
    try:
        settings = model.model_validate(tree)
    except pydantic.ValidationError as exc:
        problems = [*problems, *_problems_of(exc, list(leaves), origins)]
    if settings is None or problems:
        lines = (
            f"{where}: {v.field}: {v.description}" if v.field else f"{where}: {v.description}"
            for where, v in problems
        )
        raise SettingsError(
            "\n".join(lines),
            metadata={"keys": ",".join(v.field for _, v in problems)},
            violations=tuple(v for _, v in problems),
        )
    return Loaded(settings, origins)
