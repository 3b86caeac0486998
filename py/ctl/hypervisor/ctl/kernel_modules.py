"""Finds modules of an installed kernel, and the order in which they can be loaded one by one."""

import gzip
import lzma
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["KernelModules", "Module", "module_name"]


def module_name(file: str) -> str:
    """The module's name by its file: ``kernel/x/virtio-rng.ko.xz`` is ``virtio_rng``."""
    return PurePosixPath(file).name.partition(".ko")[0].replace("-", "_")


@dataclass(frozen=True, slots=True)
class Module:
    """One module: its name and its file below the directory of modules."""

    name: str
    file: str


class KernelModules:
    """Modules of one kernel in its directory ``/lib/modules/RELEASE``. Raises OSError for one that cannot be read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files, self._needs = parse_dependencies((directory / "modules.dep").read_text(encoding="utf-8"))
        builtin = (directory / "modules.builtin").read_text(encoding="utf-8")
        self._builtin = frozenset(module_name(line) for line in builtin.split())

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that this kernel has neither as a module nor built in."""
        return [name for name in names if name not in self._files and name not in self._builtin]

    def in_order(self, names: Sequence[str]) -> list[Module]:
        """The modules and all they need, each after what it needs; those built in or not there are left out."""
        ordered: dict[str, None] = {}

        def add(name: str, path: tuple[str, ...]) -> None:
            if name in ordered or name in path or name not in self._files:
                return
            for needed in self._needs[name]:
                add(needed, (*path, name))
            ordered[name] = None

        for name in names:
            add(name, ())
        return [Module(name, self._files[name]) for name in ordered]

    def read(self, module: Module) -> bytes:
        """The module as the kernel takes it, not compressed. Raises OSError."""
        data = (self._directory / module.file).read_bytes()
        try:
            if module.file.endswith(".xz"):
                return lzma.decompress(data)
            if module.file.endswith(".gz"):
                return gzip.decompress(data)
        except (lzma.LZMAError, EOFError) as exc:
            raise OSError(f"{self._directory / module.file} is damaged: {exc}") from exc
        if not data.startswith(b"\x7fELF"):
            raise OSError(f"{self._directory / module.file} is compressed in a way that is not known here")
        return data


def parse_dependencies(text: str) -> tuple[Mapping[str, str], Mapping[str, tuple[str, ...]]]:
    """Files and needed modules, both by module, of the text of a ``modules.dep``."""
    files: dict[str, str] = {}
    needs: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        file, _, rest = line.partition(":")
        files[module_name(file)] = file
        # depmod lists what is needed first last.
        needs[module_name(file)] = tuple(module_name(other) for other in reversed(rest.split()))
    return files, needs
