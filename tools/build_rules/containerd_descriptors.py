"""Make a FileDescriptorSet of containerd's API from the PyPI wheel ``containerd``.

The wheel's modules were generated in 2021 and cannot be imported beside a current protobuf, but each holds its file's
serialized descriptor as a bytes literal. This reads those literals (the modules are parsed, never run), drops what
matters to Go alone (gogoproto and containerd's plugin options) and moves the files from ``containerd/`` to
``containerd_api/``, so that the Python modules are ``containerd_api.services.tasks.v1.tasks_pb2``. Package names, and
so service and message names on the wire, stay as they are.

    python containerd_descriptors.py DIRECTORY_WITH_THE_UNPACKED_WHEEL OUT.pb
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2

__all__ = ["build_descriptor_set", "main"]

_OLD_ROOT = "containerd/"
_NEW_ROOT = "containerd_api/"
# Go's annotations; what they define is nothing but options.
_DROPPED_PREFIXES = ("containerd/vendor/", "containerd/protobuf/")
# The wire schemas of ttRPC (shim to containerd) are no part of the gRPC API.
_UNUSED_PREFIXES = ("containerd/services/ttrpc/",)


def _serialized_descriptor(module: Path) -> bytes | None:
    """The ``serialized_pb=b'...'`` argument of a generated module, or None where there is none."""
    for node in ast.walk(ast.parse(module.read_bytes(), filename=str(module))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if not (isinstance(function, ast.Attribute) and function.attr == "FileDescriptor"):
            continue
        for keyword in node.keywords:
            if keyword.arg == "serialized_pb" and isinstance(keyword.value, ast.Constant):
                value = keyword.value.value
                if isinstance(value, bytes):
                    return value
    return None


def _renamed(name: str) -> str:
    return _NEW_ROOT + name.removeprefix(_OLD_ROOT) if name.startswith(_OLD_ROOT) else name


def _without_go(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    result = descriptor_pb2.FileDescriptorProto()
    result.CopyFrom(file)
    result.name = _renamed(file.name)
    del result.dependency[:]
    result.dependency.extend(
        _renamed(name) for name in file.dependency if not name.startswith(_DROPPED_PREFIXES)
    )
    # These are indexes into `dependency`, which has just become shorter; neither changes what is generated.
    del result.public_dependency[:]
    del result.weak_dependency[:]
    # Go's annotations are extensions that nothing here defines; standard options (map_entry) stay.
    result.DiscardUnknownFields()
    return result


def _files(root: Path) -> Iterator[descriptor_pb2.FileDescriptorProto]:
    for module in sorted(root.glob("containerd/**/*_pb2.py")):
        serialized = _serialized_descriptor(module)
        if serialized is None:
            raise ValueError(
                f"{module.relative_to(root)} holds no serialized descriptor: is this wheel 1.5.3?"
            )
        file = descriptor_pb2.FileDescriptorProto.FromString(serialized)
        if not file.name.startswith(_DROPPED_PREFIXES + _UNUSED_PREFIXES):
            yield _without_go(file)


def _well_known(names: set[str]) -> Iterator[descriptor_pb2.FileDescriptorProto]:
    """Files of google.protobuf and google.rpc, from the installed packages: protoc wants the set complete."""
    pending = sorted(names)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        module = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        pending.extend(file.dependency)
        yield file


def build_descriptor_set(root: Path) -> descriptor_pb2.FileDescriptorSet:
    """The complete set, each file after its imports, from a directory that holds the wheel's ``containerd`` package."""
    files = {file.name: file for file in _files(root)}
    if not files:
        raise ValueError(f"no containerd modules in {root}")
    imported = {name for file in files.values() for name in file.dependency}
    for file in _well_known({name for name in imported if name.startswith("google/")}):
        files[file.name] = file
    if missing := sorted(imported - files.keys()):
        raise ValueError(f"files are imported that the wheel lacks: {', '.join(missing)}")
    ordered: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def add(name: str) -> None:
        if name not in ordered:
            for dependency in files[name].dependency:
                add(dependency)
            ordered[name] = files[name]

    for name in sorted(files):
        add(name)
    return descriptor_pb2.FileDescriptorSet(file=list(ordered.values()))


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: containerd_descriptors.py WHEEL_DIRECTORY OUT.pb", file=sys.stderr)
        return 2
    root, out = Path(argv[0]), Path(argv[1])
    out.write_bytes(build_descriptor_set(root).SerializeToString(deterministic=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
