"""Builds libvirt-python from its source distribution: a PEP 517 backend that stands in for setuptools.

libvirt's Python module is published as source alone: it wraps whatever libvirt the host has. pip fetches it and checks
its hash as it does for wheels, and calls this module where the distribution names ``setuptools.build_meta``. So nothing
that no hash pins takes part: neither setuptools nor the distribution's setup.py is run, only its generator, which
writes the wrapper from libvirt's API description. The host gives the C compiler (``CC``), pkg-config and libvirt-dev.

The same inputs give the same bytes. docs/decisions/0011-libvirt-python.md says why.
"""

import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

__all__ = ["build_wheel", "get_requires_for_build_wheel", "prepare_metadata_for_build_wheel"]

_NOT_BEFORE_1980 = (1980, 1, 1, 0, 0, 0)
_FLAGS = ("-shared", "-fPIC", "-O2", "-g0", "-DNDEBUG", "-fwrapv", "-fno-strict-aliasing")
_COMMON = ("typewrappers.c", "libvirt-utils.c")
# Modules as setup.py has them, but for libvirt_lxc, whose library Debian's libvirt has for programs that we do not run.
_MODULES = {
    "libvirt": ("libvirtmod", ("virt",)),
    "libvirt-qemu": ("libvirtmod_qemu", ("virt-qemu", "virt")),
}


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """Nothing."""
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: object = None) -> str:
    """Write NAME-VERSION.dist-info; returns its name. The working directory is the unpacked distribution."""
    directory = _dist_info()
    for name, content in _metadata().items():
        target = Path(metadata_directory, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return directory


def build_wheel(
    wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None
) -> str:
    """Generate, compile and pack; returns the wheel's file name."""
    members = _metadata()
    for api in _MODULES:
        members |= _build_module(api)
    record = f"{_dist_info()}/RECORD"
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in sorted(members.items())]
    members[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    wheel = f"{_dist_info().removesuffix('.dist-info')}-{_tag()}.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w") as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, _NOT_BEFORE_1980)
            info.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            archive.writestr(info, members[name])
    return wheel


def _build_module(api: str) -> dict[str, bytes]:
    description = Path(_pkg_config("--variable=libvirt_api")[0])
    if api != "libvirt":
        description = description.with_name(f"{api}-api.xml")
    Path("build").mkdir(exist_ok=True)
    for language in ("c", "py"):
        _run([sys.executable, "generator.py", api, str(description), language])
    name, libraries = _MODULES[api]
    library = name + sysconfig.get_config_var("EXT_SUFFIX")
    command = [os.environ.get("CC") or "cc", *_FLAGS]
    command += [f"-I{sysconfig.get_path('include')}", "-I.", "-Ibuild", *_pkg_config("--cflags")]
    command += [f"{api}-override.c", f"build/{api}.c", *_COMMON, "-o", library]
    command += ["-Wl,--build-id=none,-s", *_pkg_config("--libs-only-L"), *(f"-l{lib}" for lib in libraries)]
    _run(command)
    module = f"{api.replace('-', '_')}.py"
    return {library: Path(library).read_bytes(), module: Path("build", module).read_bytes()}


def _metadata() -> dict[str, bytes]:
    directory = _dist_info()
    wheel = f"Wheel-Version: 1.0\nGenerator: hypervisor\nRoot-Is-Purelib: false\nTag: {_tag()}\n"
    return {
        f"{directory}/METADATA": Path("PKG-INFO").read_bytes(),
        f"{directory}/WHEEL": wheel.encode(),
        f"{directory}/COPYING": Path("COPYING").read_bytes(),
    }


def _dist_info() -> str:
    return f"libvirt_python-{Path('VERSION').read_text(encoding='utf-8').strip()}.dist-info"


def _tag() -> str:
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"{python}-{python}-{platform}"


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _pkg_config(option: str) -> list[str]:
    try:
        return _run(["pkg-config", "--print-errors", option, "libvirt"]).split()
    except (OSError, SystemExit) as exc:
        raise SystemExit(f"libvirt-dev and pkg-config are needed: run tools/setup\n{exc}") from exc


def _run(command: list[str]) -> str:
    # The generator's output must not depend on the order of Python's sets.
    environment = os.environ | {"PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": "0", "LC_ALL": "C"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
