"""A double of the server, and the command line run against it."""

import json
import os
import sys
from dataclasses import dataclass

import pytest

from hvtest_fake_server import FakeServer
from hvtest_terminal import Terminal
from hypervisor.ctl.__main__ import run
from hypervisor.ctl.invocation import Invocation


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


class Ctl:
    """Runs commands in this process, or on a terminal."""

    def __init__(self, environ, capsys):
        self.environ = environ
        self._capsys = capsys

    def __call__(self, *arguments):
        self._capsys.readouterr()
        code = run(list(arguments), invocation=Invocation(environ=self.environ))
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def terminal(self, *arguments, **options):
        command = [sys.executable, "-m", "hypervisor.ctl", *arguments]
        return Terminal(command, environ={**os.environ, **self.environ, "TERM": "xterm"}, **options)


@pytest.fixture
def server():
    with FakeServer() as running:
        yield running


@pytest.fixture
def ctl(server, tmp_path, capsys):
    environ = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "HYPERVISOR_SERVER": server.address,
        "HYPERVISOR_CTL_CONFIG": str(tmp_path / "ctl.yaml"),
    }
    return Ctl(environ, capsys)
