"""Run protoc: messages, services and type stubs for Python. An action of proto.bzl; tools/dev_environment runs it too.

Needs grpcio-tools, mypy-protobuf and googleapis-common-protos on sys.path. Every .proto file yields the same four
modules, also where it holds no service, so that a build system knows the outputs beforehand.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

import google.rpc
import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

__all__ = ["generate", "main", "names_in_descriptor_set", "write_descriptor_set"]

_PLUGINS = {"mypy": "mypy_protobuf.main:main", "mypy_grpc": "mypy_protobuf.main:grpc"}
_INSTALLED_PREFIXES = ("google/protobuf/", "google/rpc/", "google/api/")


def _write_plugin(directory: Path, name: str, entry_point: str) -> Path:
    """Write an executable protoc plug-in: the wheel's own script names the interpreter of another machine."""
    module, function = entry_point.split(":")
    program = directory / f"protoc-gen-{name}"
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    program.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -sS -c {shlex.quote(code)}\n", encoding="ascii"
    )
    program.chmod(0o755)
    return program


def names_in_descriptor_set(path: Path) -> list[str]:
    """Names of the files in a FileDescriptorSet for which modules have to be generated, sorted."""
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    return sorted(file.name for file in descriptors.file if not file.name.startswith(_INSTALLED_PREFIXES))


def _search_paths(proto_paths: list[Path]) -> list[str]:
    """protoc's -I arguments: the given roots, then google.protobuf and googleapis from the installed packages."""
    installed = [Path(grpc_tools.__path__[0]) / "_proto", Path(google.rpc.__path__[0]).parent.parent]
    return [f"-I{path}" for path in [*proto_paths, *installed]]


def _run_protoc(arguments: list[str]) -> None:
    if code := protoc.main(["protoc", *arguments]):
        raise RuntimeError(f"protoc failed with exit code {code}")


def write_descriptor_set(out: Path, names: list[str], *, proto_paths: list[Path]) -> None:
    """Write the named .proto files and their imports, with comments, as a FileDescriptorSet."""
    options = ["--include_imports", "--include_source_info", f"--descriptor_set_out={out}"]
    _run_protoc([*_search_paths(proto_paths), *options, *names])


def generate(
    out: Path, names: list[str], *, proto_paths: list[Path], descriptor_set: Path | None = None
) -> None:
    """Generate the modules of the named .proto files below `out`; raises RuntimeError where protoc refuses them."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = [f"--python_out={out}", f"--grpc_python_out={out}"]
        for plugin, entry_point in _PLUGINS.items():
            program = _write_plugin(Path(temporary), plugin, entry_point)
            arguments += [f"--plugin=protoc-gen-{plugin}={program}", f"--{plugin}_out=quiet:{out}"]
        if descriptor_set is not None:
            arguments.append(f"--descriptor_set_in={descriptor_set}")
        else:
            arguments += _search_paths(proto_paths)
        # The plug-ins are processes of their own and import what this one can.
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        _run_protoc([*arguments, *names])
    for name in names:
        stem = name.removesuffix(".proto")
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            module = out / (stem + suffix)
            if not module.exists():
                module.write_text('"""No service in this file."""\n', encoding="ascii")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--proto-path", type=Path, action="append", default=[])
    parser.add_argument("--descriptor-set", type=Path)
    parser.add_argument("--write-descriptor-set", type=Path, help="write this file in place of modules")
    parser.add_argument("names", nargs="*", help=".proto files, relative to a --proto-path")
    options = parser.parse_args(argv)
    names = options.names
    if options.descriptor_set is not None:
        names = names_in_descriptor_set(options.descriptor_set)
    if options.write_descriptor_set is not None:
        write_descriptor_set(options.write_descriptor_set, names, proto_paths=options.proto_path)
        return 0
    generate(options.out, names, proto_paths=options.proto_path, descriptor_set=options.descriptor_set)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
