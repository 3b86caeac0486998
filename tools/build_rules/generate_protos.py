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

__all__ = ["generate", "main", "names_in_descriptor_set"]

_PLUGINS = {"mypy": "mypy_protobuf.main:main", "mypy_grpc": "mypy_protobuf.main:grpc"}
_INSTALLED_PREFIXES = ("google/protobuf/", "google/rpc/", "google/api/")


def _write_plugin(directory: Path, name: str, entry_point: str) -> Path:
    """Write an executable protoc plug-in: the wheel's own script names the interpreter of another machine."""
    module, function = entry_point.split(":")
    program = directory / f"protoc-gen-{name}"
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    program.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -sS -c {shlex.quote(code)}\n", encoding="ascii")
    program.chmod(0o755)
    return program


def names_in_descriptor_set(path: Path) -> list[str]:
    """Names of the files in a FileDescriptorSet for which modules have to be generated, sorted."""
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    return sorted(file.name for file in descriptors.file if not file.name.startswith(_INSTALLED_PREFIXES))


def generate(out: Path, names: list[str], *, proto_paths: list[Path], descriptor_set: Path | None = None) -> None:
    """Generate the modules of the named .proto files below `out`; raises RuntimeError where protoc refuses them."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = ["protoc", f"--python_out={out}", f"--grpc_python_out={out}"]
        for plugin, entry_point in _PLUGINS.items():
            program = _write_plugin(Path(temporary), plugin, entry_point)
            arguments += [f"--plugin=protoc-gen-{plugin}={program}", f"--{plugin}_out=quiet:{out}"]
        if descriptor_set is not None:
            arguments.append(f"--descriptor_set_in={descriptor_set}")
        else:
            arguments += [f"-I{path}" for path in proto_paths]
            arguments.append(f"-I{Path(grpc_tools.__path__[0]) / '_proto'}")
            arguments.append(f"-I{Path(google.rpc.__path__[0]).parent.parent}")
        # The type stubs need PYTHONPATH in the plug-ins, which are processes of their own.
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        if code := protoc.main([*arguments, *names]):
            raise RuntimeError(f"protoc failed with exit code {code}")
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
    parser.add_argument("names", nargs="*", help=".proto files, relative to a --proto-path")
    options = parser.parse_args(argv)
    names = options.names
    if options.descriptor_set is not None:
        names = names_in_descriptor_set(options.descriptor_set)
    generate(options.out, names, proto_paths=options.proto_path, descriptor_set=options.descriptor_set)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
