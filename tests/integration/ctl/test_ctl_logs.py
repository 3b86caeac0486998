"""``instance logs`` and recordings of consoles, against the double of the server."""

import os
import subprocess
import sys

import pytest

from hvtest_asciicast import read_cast
from hypervisor.core.errors import Unimplemented
from hypervisor.v1.instance_pb2 import ConsoleInput, ConsoleOutput


@pytest.fixture
def web(server):
    server.add_node("node-1")
    return server.add_instance("web")


def run(ctl, *arguments, typed=b""):
    return subprocess.run(
        [sys.executable, "-m", "hypervisor.ctl", *arguments],
        env={**os.environ, **ctl.environ},
        input=typed,
        capture_output=True,
        timeout=30,
        check=False,
    )


def logs(ctl, *arguments):
    return run(ctl, "instance", "logs", "web", *arguments)


def test_what_was_printed_comes_as_it_is(server, ctl, web):
    server.logged = b"caf\xc3\xa9 \x00\xff\x1b[31m\r\n"

    done = logs(ctl)

    assert (done.returncode, done.stdout, done.stderr) == (0, server.logged, b"")


def test_follow_goes_on_to_the_end(ctl, web):
    assert logs(ctl, "--follow").stdout == b"first\r\nsecond\r\nthird\r\none more\r\n"


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--tail=2", "tail_lines", 2),
        ("--tail=0", "tail_lines", 0),
        ("--tail=4KiB", "tail_bytes", 4096),
        ("--since=@17", "from_position", 17),
    ],
)
def test_the_part_that_is_asked_for(server, ctl, web, option, field, value):
    assert logs(ctl, option).returncode == 0

    request = server.called("GetInstanceLogs")[0]
    assert request.WhichOneof("start") == field
    assert getattr(request, field) == value


def test_a_span_and_a_time_are_told_apart(server, ctl, web):
    logs(ctl, "--since", "1m30s")
    logs(ctl, "--since", "2026-01-31T12:00:00Z")

    span, time = server.called("GetInstanceLogs")
    assert span.since.ToMilliseconds() == 90_000
    assert time.from_time.ToJsonString() == "2026-01-31T12:00:00Z"


def test_what_is_no_longer_kept_is_told(server, ctl, web):
    server.logged_from = 1000

    done = logs(ctl, "--since", "@400")

    assert done.stdout == server.logged
    assert b"600 bytes are not here: no longer kept" in done.stderr


@pytest.mark.parametrize(
    "wrong", [["--tail=-1"], ["--since=yesterday"], ["--tail=1000001"], ["--tail=1", "--since=1m"]]
)
def test_wrong_parts_are_usage_errors(server, ctl, web, wrong):
    done = logs(ctl, *wrong)

    assert done.returncode != 0
    assert not server.called("GetInstanceLogs")


def test_a_reader_that_has_seen_enough_is_no_error(server, ctl, web):
    server.logged = b"line\n" * 500_000
    command = f"{sys.executable} -m hypervisor.ctl instance logs web | head -1; echo ${{PIPESTATUS[0]}}"

    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, **ctl.environ},
        capture_output=True,
        timeout=30,
        check=True,
    )

    assert done.stdout == b"line\n0\n"
    assert done.stderr == b""


def test_a_recording_holds_what_was_shown_and_plays(server, ctl, web, tmp_path):
    path = tmp_path / "session.cast"

    done = run(
        ctl,
        "instance",
        "console",
        "web",
        "--record",
        str(path),
        "--size",
        "100x30",
        typed=b"h\xc3\xa9llo\nexit\n",
    )

    cast = read_cast(path)
    assert done.returncode == 0
    assert (cast.width, cast.height) == (100, 30)
    assert cast.output.encode() == done.stdout
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_recording_marks_what_is_missing(server, ctl, web, tmp_path):
    def script(outgoing):
        outgoing.put(ConsoleOutput(skipped=ConsoleOutput.Skipped(bytes=4096)))
        outgoing.put(
            ConsoleOutput(notice=ConsoleOutput.Notice(reason="HOLDER_RESTARTED", message="it was replaced"))
        )
        outgoing.put(ConsoleOutput(closed=ConsoleOutput.Closed(reason="EXITED", exit_code=0)))
        outgoing.put(None)

    server.console_script = script
    path = tmp_path / "session.cast"

    done = run(ctl, "instance", "console", "web", "--record", str(path))

    assert [text for _, code, text in read_cast(path).events if code == "m"] == [
        "[4096 bytes of output were skipped: this viewer was too slow]",
        "[it was replaced]",
    ]
    assert b"it was replaced" in done.stderr


def test_a_recording_follows_the_window(server, ctl, web, tmp_path):
    path = tmp_path / "session.cast"
    with ctl.terminal("instance", "console", "web", "--record", str(path), columns=101, rows=37) as terminal:
        terminal.read_until(b"$ ")
        terminal.resize(66, 22)
        while (66, 22) not in server.console_sizes:
            terminal.type(b"\n")
            terminal.read_until(b"\n")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0

    cast = read_cast(path)
    assert (cast.width, cast.height) == (101, 37)
    assert [text for _, code, text in cast.events if code == "r"] == ["66x22"]


def test_a_recording_overwrites_nothing(server, ctl, web, tmp_path):
    path = tmp_path / "session.cast"
    path.write_text("precious")

    done = run(ctl, "instance", "console", "web", "--record", str(path))

    assert done.returncode != 0
    assert b"is there already" in done.stderr
    assert path.read_text() == "precious"
    assert not server.called("AttachConsole")


def test_a_replay_may_begin_at_a_time_and_a_size_may_be_fixed(server, ctl, web):
    run(
        ctl, "instance", "console", "web", "--since", "5m", "--fixed-size", "--size", "90x20", typed=b"exit\n"
    )

    opening = server.called("AttachConsole")[0].open
    assert opening.replay_since.ToMilliseconds() == 300_000
    assert opening.resize_policy == ConsoleInput.RESIZE_POLICY_FIXED
    assert (opening.size.width, opening.size.height) == (90, 20)


def test_a_fixed_size_needs_a_size(server, ctl, web):
    done = run(ctl, "instance", "console", "web", "--fixed-size")

    assert done.returncode == 2
    assert b"give --size" in done.stderr


def test_credit_is_granted_for_what_was_shown(server, ctl, web):
    def script(outgoing):
        for _ in range(16):
            outgoing.put(ConsoleOutput(data=b"x" * (64 << 10)))

    server.console_script = script

    done = run(ctl, "instance", "console", "web", "--replay", "none", "--until-idle", "500ms")

    assert server.called("AttachConsole")[0].open.window_bytes == 256 << 10
    assert len(done.stdout) == 1 << 20
    assert server.console_credit == 1 << 20


def test_a_node_whose_agent_knows_no_credit_is_attached_to_without_from_where_it_was(server, ctl, web):
    """As with a command line and a server that were upgraded before an agent."""
    server.console_knows_credit = False

    def script(outgoing):
        if len(server.called("AttachConsole")) == 1:
            for _ in range(3):
                outgoing.put(ConsoleOutput(data=b"x" * (64 << 10)))
        else:
            outgoing.put(ConsoleOutput(data=b"y" * (512 << 10)))

    server.console_script = script

    done = run(ctl, "instance", "console", "web", "--replay", "none", "--until-idle", "500ms")

    assert done.returncode == 0, done.stderr
    first, second = (call.open for call in server.called("AttachConsole"))
    assert first.window_bytes == 256 << 10
    assert second.window_bytes == 0
    shown = done.stdout.count(b"x")
    # The refusal is on its way while more is shown.
    assert shown in (128 << 10, 192 << 10)
    assert second.replay_from_position == shown
    assert done.stdout == b"x" * shown + b"y" * (512 << 10)
    assert b"older version" in done.stderr


def test_another_capability_that_is_missing_is_told(server, ctl, web):
    def script(outgoing):
        outgoing.put(
            Unimplemented("it has no console", reason="CAPABILITY_MISSING", metadata={"verb": "console"})
        )

    server.console_script = script

    done = run(ctl, "instance", "console", "web", "--until-idle", "500ms")

    assert done.returncode != 0
    assert b"it has no console" in done.stderr
    assert len(server.called("AttachConsole")) == 1
