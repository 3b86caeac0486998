"""The console on a real (pseudo-)terminal and in pipes."""

import os
import signal
import subprocess
import sys

import pytest

from hypervisor.v1 import instance_pb2
from hypervisor.v1.instance_pb2 import ConsoleOutput


@pytest.fixture
def web(server):
    server.add_node("node-1")
    return server.add_instance("web")


def piped(ctl, *arguments, typed=b"", timeout=30):
    return subprocess.run(
        [sys.executable, "-m", "hypervisor.ctl", "instance", "console", "web", *arguments],
        env={**os.environ, **ctl.environ},
        input=typed,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def test_replays_echoes_and_leaves_with_the_escape(server, ctl, web):
    with ctl.terminal("instance", "console", "web") as terminal:
        terminal.read_until(b"Attached to web: Ctrl-] leaves.")
        terminal.read_until(b"Welcome to the console\r\n$ ")
        assert terminal.is_raw()
        terminal.type(b"ls\x03")
        terminal.read_until(b"ls\x03")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert b"Left web; it goes on." in terminal.seen
        assert terminal.attributes() == terminal.before
    assert bytes(server.console_input) == b"ls\x03"


def test_the_instance_learns_the_size_of_the_window_and_its_changes(server, ctl, web):
    with ctl.terminal("instance", "console", "web", columns=101, rows=37) as terminal:
        terminal.read_until(b"$ ")
        terminal.type(b"stty size\r")
        terminal.read_until(b"37 101")
        terminal.resize(66, 22)
        terminal.type(b"")
        while (66, 22) not in server.console_sizes:
            terminal.type(b"\n")
            terminal.read_until(b"\n")
        terminal.type(b"stty size\r")
        terminal.read_until(b"22 66")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_when_the_program_is_told_to_end(ctl, web, number):
    with ctl.terminal("instance", "console", "web") as terminal:
        terminal.read_until(b"$ ")
        terminal.signal(number)
        assert terminal.wait() == 128 + number
        assert terminal.attributes() == terminal.before


def test_the_terminal_is_restored_when_the_server_goes_away(server, ctl, web):
    with ctl.terminal("instance", "console", "web") as terminal:
        terminal.read_until(b"$ ")
        server.stop()
        assert terminal.wait() == 1
        assert b"the console was lost" in terminal.seen
        assert terminal.attributes() == terminal.before


def test_the_terminal_is_raw_again_after_a_stop(server, ctl, web):
    with ctl.terminal("instance", "console", "web") as terminal:
        terminal.read_until(b"$ ")
        terminal.signal(signal.SIGSTOP)
        terminal.cook()
        terminal.signal(signal.SIGCONT)
        terminal.wait_until_raw()
        terminal.type(b"x\r\x1d")
        assert terminal.wait() == 0
    assert bytes(server.console_input) == b"x\r"


def test_another_escape_lets_the_default_through(server, ctl, web):
    with ctl.terminal("instance", "console", "web", "--escape", "ctrl-a") as terminal:
        terminal.read_until(b"$ ")
        terminal.type(b"\x1d")
        terminal.read_until(b"\x1d")
        terminal.type(b"\x01")
        assert terminal.wait() == 0


def test_the_end_of_the_instance_ends_the_console_and_says_how(ctl, web):
    with ctl.terminal("instance", "console", "web") as terminal:
        terminal.read_until(b"$ ")
        terminal.type(b"exit\r")
        assert terminal.wait() == 0
        assert b"Console closed: web ended with exit code 3." in terminal.seen
        assert terminal.attributes() == terminal.before


def test_read_only_sends_nothing_but_the_escape_still_leaves(server, ctl, web):
    with ctl.terminal("instance", "console", "web", "--read-only") as terminal:
        terminal.read_until(b"$ ")
        terminal.type(b"rm -rf /\r\x1d")
        assert terminal.wait() == 0
    assert not server.console_input
    assert server.called("AttachConsole")[0].open.read_only


def test_skipped_output_and_detachment_are_told(server, ctl, web):
    def script(outgoing):
        outgoing.put(ConsoleOutput(skipped=ConsoleOutput.Skipped(bytes=4096)))
        outgoing.put(ConsoleOutput(closed=ConsoleOutput.Closed(reason="DETACHED")))
        outgoing.put(None)

    server.console_script = script

    done = piped(ctl)

    assert done.returncode == 1
    assert b"[4096 bytes of output were skipped" in done.stderr
    assert b"attach again" in done.stderr


def test_a_pipe_is_typed_and_the_output_is_passed_on_as_it_is(server, ctl, web):
    done = piped(ctl, "--replay", "none", typed=b"a\x1db\x00\xff\nexit\n")

    assert done.returncode == 0
    assert done.stdout == b"a\x1db\x00\xff\nexit\n"
    assert b"web ended with exit code 3" in done.stderr


def test_until_idle_ends_after_the_input_has_ended_and_nothing_comes(ctl, web):
    done = piped(ctl, "--until-idle", "300ms", typed=b"hello\n")

    assert done.returncode == 0
    assert done.stdout == b"Welcome to the console\r\n$ hello\n"


def test_a_console_of_what_does_not_run_is_refused_with_4(server, ctl, web):
    server.change_instance(web, instance_pb2.INSTANCE_STATUS_STOPPED, "STOPPED")

    with ctl.terminal("instance", "console", "web") as terminal:
        assert terminal.wait() == 4
        assert b"NOT_RUNNING" in terminal.seen
        assert terminal.attributes() == terminal.before


def test_progress_is_shown_on_a_terminal_and_wiped(server, ctl, web):
    held = server.hold("StopInstance")
    with ctl.terminal("instance", "stop", "web") as terminal:
        terminal.read_until(b"stop")
        terminal.read_until(b"40% preparing the image")
        held.set()
        terminal.read_until(b"\r\x1b[K")
        terminal.read_until(b"instance web stopped")
        assert terminal.wait() == 0


def test_interrupting_a_wait_tells_that_the_operation_goes_on(server, ctl, web):
    server.hold("StopInstance")
    with ctl.terminal("instance", "stop", "web") as terminal:
        terminal.read_until(b"preparing")
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert b"it goes on: hypervisor-ctl operation wait op-" in terminal.seen
