"""The deferred imports: not there until needed, whole when they are."""

import subprocess
import sys

SCRIPT = """
import sys
from hypervisor.ctl import lazygrpc
lazygrpc.defer()
import grpc
{body}
"""


def run(body):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_grpc_comes_without_asyncio():
    assert run("print(any(name.startswith(('asyncio.', 'grpc.aio.')) for name in sys.modules))") == "False"


def test_asyncio_is_whole_when_it_is_needed_after_all():
    body = (
        "import asyncio\nasync def f(): return 42\nprint(asyncio.run(f()), asyncio is sys.modules['asyncio'])"
    )

    assert run(body).startswith("42")


def test_the_asynchronous_half_of_grpc_works_when_it_is_needed_after_all():
    body = "print(grpc.aio.insecure_channel.__name__, grpc.aio.Channel.__name__)"

    assert run(body) == "insecure_channel Channel"


def test_nothing_heavy_is_imported_to_list_instances():
    body = (
        "import hypervisor.ctl.app, hypervisor.ctl.commands.instances, hypervisor.ctl.commands.instance_views\n"
        "heavy = {'asyncio.events', 'yaml', 'rich', 'msgspec', 'pydantic', 'google.protobuf.json_format', 'json'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )

    assert run(body) == "[]"
