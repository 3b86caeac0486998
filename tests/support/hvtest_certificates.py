"""Certificates for tests, made by openssl: authorities, and pairs signed by them for servers and clients."""

import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["make_authority", "make_pair", "require_openssl"]


def require_openssl() -> None:
    """Skip the test, with the reason printed, where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (Debian: apt-get install openssl)")


def _openssl(*arguments: str, directory: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


def make_authority(directory: Path, name: str) -> None:
    """``name.crt`` and ``name.key`` of an authority."""
    _openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
        *("-keyout", f"{name}.key", "-out", f"{name}.crt"),
        directory=directory,
    )


def make_pair(directory: Path, name: str, *, authority: str, names: str) -> None:
    """``name.crt`` and ``name.key`` signed by ``authority``, for server and client use, valid for ``names``."""
    (directory / f"{name}.ext").write_text(
        f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n"
    )
    _openssl(
        *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
        *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        directory=directory,
    )
    _openssl(
        *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.crt", "-CAkey", f"{authority}.key"),
        *("-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt"),
        directory=directory,
    )
