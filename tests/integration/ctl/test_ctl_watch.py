"""Lists that follow the cluster, and events, across lost connections and compactions."""

import json
import os
import subprocess
import sys
import threading

import pytest

from hypervisor.ctl.eventstream import EventStream, Follow, Relist
from hypervisor.ctl.session import Session
from hypervisor.ctl.settings import Connection
from hypervisor.v1 import instance_pb2


class Follower:
    """A command that goes on, with its lines as they come."""

    def __init__(self, ctl, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hypervisor.ctl", *arguments],
            env={**os.environ, **ctl.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self):
        """The next line; the test's time limit bounds the wait."""
        timer = threading.Timer(20, self.process.kill)
        timer.start()
        try:
            text = self.process.stdout.readline()
        finally:
            timer.cancel()
        assert text, self.process.stderr.read()
        return text.rstrip("\n")

    def close(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def follow(ctl):
    followers = []

    def start(*arguments):
        followers.append(Follower(ctl, *arguments))
        return followers[-1]

    yield start
    for follower in followers:
        follower.close()


def test_a_list_in_a_pipe_gets_a_line_for_each_change(server, follow):
    server.add_node("node-1")
    web = server.add_instance("web")
    watched = follow("instance", "list", "--watch")
    assert watched.line().startswith("NAME")
    assert watched.line().split()[:3] == ["web", "container", "running"]

    server.change_instance(web, instance_pb2.INSTANCE_STATUS_STOPPED, "STOPPED")
    assert watched.line().split()[:3] == ["web", "container", "stopped"]
    server.remove_instance(web)
    assert watched.line().endswith("(deleted)")


def test_a_filtered_list_follows_the_servers_filter(server, follow):
    server.add_node("node-1")
    watched = follow("instance", "list", "--watch", "-q", "--filter", "name=a*")
    server.add_instance("a1")
    assert watched.line() == "a1"

    server.add_instance("b1")
    server.add_instance("a2")

    assert watched.line() == "a2"


def test_json_is_one_event_a_line_from_the_beginning(server, follow):
    server.add_node("node-1")
    server.add_instance("web")
    watched = follow("instance", "list", "--watch", "-o", "json")

    first = json.loads(watched.line())
    server.add_instance("db")
    second = json.loads(watched.line())

    assert (first["type"], first["instance"]["name"]) == ("TYPE_SNAPSHOT", "web")
    assert (second["type"], second["instance"]["name"]) == ("TYPE_CREATED", "db")


def test_a_lost_connection_is_resumed_without_a_gap(server, follow):
    server.add_node("node-1")
    watched = follow("events", "-q", "--initial")
    assert watched.line() == "node-1"
    server.add_instance("a")
    assert watched.line() == "a"

    address = server.address
    server.stop()
    server.add_instance("b")
    server.start(address)
    server.add_instance("c")

    assert [watched.line(), watched.line()] == ["b", "c"]


def test_a_server_that_is_killed_and_started_anew_is_found_again(server, follow):
    server.add_node("node-1")
    watched = follow("node", "list", "--watch", "-q")
    assert watched.line() == "node-1"
    server.wait_for_call("WatchEvents")
    address = server.address

    server.stop()
    server.start(address)
    server.add_node("node-2")

    assert watched.line() == "node-2"


def test_a_compacted_history_is_listed_again(server, follow):
    server.add_node("node-1")
    server.add_instance("a")
    watched = follow("instance", "list", "--watch", "-q")
    assert watched.line() == "a"
    server.wait_for_call("WatchEvents")
    address = server.address

    server.stop()
    server.add_instance("b")
    server.compact()
    server.start(address)

    assert [watched.line(), watched.line()] == ["a", "b"]


def test_events_after_a_revision_that_is_gone_are_refused(server, ctl):
    server.add_instance("a")
    server.compact()

    done = ctl("events", "--after", "50")

    assert (done.code, "the history after revision 50 is gone" in done.err) == (1, True)


def test_events_after_a_revision_come_first(server, follow):
    server.add_instance("a")
    revision = server.revision
    server.add_instance("b")

    watched = follow("events", "-q", "--after", str(revision))

    assert watched.line() == "b"


def test_a_table_on_a_terminal_is_drawn_over_itself(server, ctl):
    server.add_node("node-1")
    web = server.add_instance("web")
    with ctl.terminal("instance", "list", "--watch") as terminal:
        terminal.read_until(b"running")
        server.change_instance(web, instance_pb2.INSTANCE_STATUS_STOPPED, "STOPPED")
        redrawn = terminal.read_until(b"stopped")
        assert b"\x1b[2A" in redrawn
        terminal.type(b"\x03")
        assert terminal.wait() == 130


def test_nothing_is_missed_between_the_list_anew_and_the_events_after_it(server):
    first = server.add_instance("a")
    with Session(Connection(server.address, tls=None, token=None, context=None)) as session:
        stream = EventStream(session, Follow(kinds=("instance",)), after_revision=first.resource_version - 1)
        server.compact()
        events = iter(stream)
        assert isinstance(next(events), Relist)
        stream.position = server.revision
        server.add_instance("made-meanwhile")

        assert next(events).object_name == "made-meanwhile"


def test_a_connection_that_falls_silent_is_made_again(server, capsys):
    first = server.add_instance("a")
    server.mute_watches = 1
    with Session(Connection(server.address, tls=None, token=None, context=None)) as session:
        stream = EventStream(
            session, Follow(), after_revision=first.resource_version - 1, heard_from=True, silence_s=0.3
        )

        assert next(iter(stream)).object_name == "a"

    assert "it said nothing for 0.3 s" in capsys.readouterr().err
    assert len(server.called("WatchEvents")) == 2
