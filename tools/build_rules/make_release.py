"""Write a release tarball: bin/<program>, lib/ (import roots merged), VERSION. The action of release.bzl.

The tarball depends on nothing but the contents of its inputs: members are sorted, owners and times are zero, and byte
code holds the hash of its source in place of a time.
"""

from __future__ import annotations

import argparse
import gzip
import io
import py_compile
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"

# Isolated (-I) and without site (-S): nothing of the host but the standard library is imported, and start-up is short.
# The interpreter of /usr comes first because one on PATH may be a version manager's shim, which costs more time than
# the whole program.
LAUNCHER = """#!/bin/sh
# {program}: needs CPython {python} on this host and nothing else. HYPERVISOR_PYTHON names one that is elsewhere.
self=$0
if [ -L "$self" ]; then self=$(readlink -f -- "$self") || exit 1; fi
case $self in /*) ;; *) self=$PWD/$self ;; esac
lib=${{self%/*/*}}/lib
for python in "${{HYPERVISOR_PYTHON:-}}" /usr/bin/python{python} /usr/local/bin/python{python} \\
  "$(command -v python{python})"; do
  if [ -n "$python" ] && [ -x "$python" ]; then
    exec "$python" -I -S -c '
import sys
if sys.version_info[:2] != ({major}, {minor}) or sys.implementation.name != "cpython":
    sys.exit("{program}: needs CPython {python}, and %s is %s %s: set HYPERVISOR_PYTHON to another" % (
        sys.executable, sys.implementation.name, sys.version.split()[0]))
sys.path.insert(0, sys.argv.pop(1))
sys.argv[0] = "{program}"
from {module} import main
sys.exit(main())
' "$lib" "$@"
  fi
done
echo "{program}: no CPython {python} found: install it (Debian 12: apt-get install python{python})," \\
  "or set HYPERVISOR_PYTHON to its path" >&2
exit 1
"""

# Needed to build or to check against a package, never to run it.
_NOT_AT_RUN_TIME = (".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cc", ".cpp", ".h", ".hash", ".proto", "/py.typed")


def expand_parameter_files(arguments: list[str]) -> Iterator[str]:
    """Yield the arguments, with @FILE replaced by the lines of the file."""
    for argument in arguments:
        if argument.startswith("@"):
            yield from Path(argument[1:]).read_text(encoding="utf-8").splitlines()
        else:
            yield argument


def library_members(pairs: list[str], roots: list[str], *, workspace: str) -> dict[str, Path]:
    """Map `lib/...` to the file that goes there.

    `pairs` are "short path=path" of Bazel's files. Files below no import root are left out. Two roots that hold
    different files of one name are an error: the programs would import whichever came first.
    """
    prefixes = sorted((root + "/" for root in roots), key=len, reverse=True)
    members: dict[str, Path] = {}
    for pair in pairs:
        short, _, path = pair.partition("=")
        runfile = short.removeprefix("../") if short.startswith("../") else f"{workspace}/{short}"
        prefix = next((prefix for prefix in prefixes if runfile.startswith(prefix)), None)
        if prefix is None or runfile.endswith(_NOT_AT_RUN_TIME):
            continue
        member = "lib/" + runfile.removeprefix(prefix)
        if member in members and members[member].read_bytes() != Path(path).read_bytes():
            raise SystemExit(f"two packages own {member}: {members[member]} and {path}")
        members[member] = Path(path)
    return members


def byte_code_name(member: str) -> str:
    """Name below which CPython looks for the byte code of a module."""
    directory, _, name = member.rpartition("/")
    return f"{directory}/__pycache__/{name.removesuffix('.py')}.{sys.implementation.cache_tag}.pyc"


def compile_module(source: Path, member: str, scratch: Path) -> bytes:
    """Byte code that is used without a look at the source; tracebacks get the source's place at import."""
    target = scratch / "module.pyc"
    py_compile.compile(
        str(source),
        cfile=str(target),
        dfile=member.removeprefix("lib/"),
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    return target.read_bytes()


def stamped_version(version_file: Path, status_file: Path | None) -> str:
    """The version, with the commit where the build is stamped: 1.2.3 or 1.2.3+0123456789ab."""
    version = version_file.read_text(encoding="utf-8").strip()
    if status_file is None:
        return version
    for line in status_file.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(" ")
        if key == "STABLE_COMMIT":
            return f"{version}+{value.replace('-', '.')}"
    raise SystemExit(f"{status_file} names no STABLE_COMMIT: see tools/workspace_status.sh")


def write_tarball(out: Path, prefix: str, members: dict[str, tuple[bytes, int]]) -> None:
    """Write name -> (content, mode) as a tar.gz that holds no time, owner or order of its own."""
    with (
        out.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name in sorted(members):
            content, mode = members[name]
            info = tarfile.TarInfo(f"{prefix}/{name}")
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--version-file", type=Path, required=True)
    parser.add_argument("--status-file", type=Path)
    parser.add_argument("--program", action="append", default=[], metavar="NAME=MODULE")
    parser.add_argument("--root", action="append", default=[])
    parser.add_argument("--extra", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("files", nargs="*")
    options = parser.parse_intermixed_args(list(expand_parameter_files(argv)))

    library = library_members(options.files, options.root, workspace=options.workspace)
    members = {
        name: (path.read_bytes(), 0o755 if name.endswith(".so") else 0o644) for name, path in library.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name in sorted(library):
            if name.endswith(".py") and byte_code_name(name) not in members:
                members[byte_code_name(name)] = (compile_module(library[name], name, Path(scratch)), 0o644)
    for program in options.program:
        name, _, module = program.partition("=")
        launcher = LAUNCHER.format(
            program=name,
            module=module,
            python=PYTHON,
            major=sys.version_info[0],
            minor=sys.version_info[1],
        )
        members[f"bin/{name}"] = (launcher.encode(), 0o755)
    for extra in options.extra:
        name, _, path = extra.partition("=")
        members[name] = (Path(path).read_bytes(), 0o644)
    members["VERSION"] = ((stamped_version(options.version_file, options.status_file) + "\n").encode(), 0o644)
    write_tarball(options.out, options.prefix, members)


if __name__ == "__main__":
    main(sys.argv[1:])
