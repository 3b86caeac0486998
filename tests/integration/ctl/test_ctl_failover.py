"""Several servers: the command line goes on with another one, and what it changes is changed once."""

import socket
import threading

import pytest

from hvtest_fake_server import FakeServer


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def stops(server: FakeServer) -> int:
    return len([name for name, _ in server.calls if name == "StopInstance"])


@pytest.fixture
def silent():
    """A server that hangs: it takes connections, and says nothing on them."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_is_not_there_is_passed_over(server, ctl):
    server.add_instance("a")
    servers = f"{closed_port()},{closed_port()}, {server.address}"

    assert ctl("instance", "list", "-q", "--server", servers).out == "a\n"
    assert ctl("instance", "stop", "a", "--server", servers).code == 0
    assert stops(server) == 1


def test_a_server_that_hangs_is_left_for_another_one(server, ctl, silent):
    server.add_instance("a")

    assert ctl("instance", "list", "-q", "--server", f"{silent},{server.address}").out == "a\n"


def test_when_none_is_there_the_error_is_told_at_once(ctl):
    done = ctl("instance", "list", "--server", f"{closed_port()},{closed_port()}")

    assert done.code == 1
    assert "hypervisor-ctl dev up" in done.err


def test_a_change_whose_answer_was_lost_is_settled_by_another_server(server, ctl):
    """Both servers are over one store, as those of a cluster are."""
    server.add_instance("a")
    first = server.address
    server.lose_reply("StopInstance")
    second = closed_port()
    other = FakeServer()
    other.__dict__.update({key: value for key, value in server.__dict__.items() if key != "_server"})
    other.start(second)
    try:
        done = ctl("instance", "stop", "a", "--server", f"{first},{second}")
    finally:
        other.stop()

    assert done.code == 0
    assert stops(server) == 1
    assert other.calls is server.calls


def test_events_go_on_at_another_server(server, ctl):
    first, second = server.address, closed_port()
    server.add_instance("before")
    with ctl.terminal("events", "--initial", "--server", f"{first},{second}") as watching:
        watching.read_until(b"before")
        server.stop()
        server.start(second)
        server.add_instance("after")
        watching.read_until(b"after")


def test_a_context_has_several_servers(server, ctl, tmp_path):
    server.add_instance("a")
    del ctl.environ["HYPERVISOR_SERVER"]
    (tmp_path / "ctl.yaml").write_text(
        f"current: lab\ncontexts:\n  lab:\n    server: ['{closed_port()}', '{server.address}']\n"
    )

    assert ctl("instance", "list", "-q").out == "a\n"
    assert ctl("context", "set", "lab", "--server", f"{server.address},{closed_port()}").code == 0
    assert ctl("instance", "list", "-q").out == "a\n"
    assert ctl("context", "list", "-o", "json").code == 0


def test_calls_of_many_instances_at_once_move_together(server, ctl):
    """Bulk commands make their calls in several threads over one session."""
    names = [f"i{number}" for number in range(12)]
    for name in names:
        server.add_instance(name)

    done = ctl("instance", "stop", *names, "--server", f"{closed_port()},{server.address}")

    assert done.code == 0, done.err
    assert stops(server) == len(names)
    assert threading.active_count() < 50
