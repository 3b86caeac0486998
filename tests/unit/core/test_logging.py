import asyncio
import io
import json
import logging as standard_logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from hypervisor.core import logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = standard_logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    standard_logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_of_json_with_its_values(stream: io.StringIO) -> None:
    logging.configure(program="tester", format=logging.LogFormat.JSON, stream=stream)

    structlog.get_logger("x").info("instance_started", instance_id="i-1", pid=7, text="two\nlines")

    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "instance_started",
        "instance_id": "i-1",
        "pid": 7,
        "text": "two\nlines",
        "level": "info",
        "program": "tester",
    }


async def test_bound_values_follow_into_tasks_and_end_with_the_block(stream: io.StringIO) -> None:
    logging.configure(program="tester", format=logging.LogFormat.JSON, stream=stream)
    log = structlog.get_logger()

    async def work() -> None:
        log.info("inside")

    with logging.bind(request_id="r-1"):
        await asyncio.create_task(work())
    log.info("outside")

    assert [line.get("request_id") for line in lines(stream)] == ["r-1", None]


def test_the_standard_library_is_routed_in_with_the_bound_values(stream: io.StringIO) -> None:
    logging.configure(program="tester", format=logging.LogFormat.JSON, stream=stream)

    with logging.bind(request_id="r-1"):
        standard_logging.getLogger("grpc._channel").warning("went %s", "away")
        standard_logging.getLogger("grpc._channel").info("chatter")

    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["request_id"]) == ("went away", "grpc._channel", "r-1")


def test_an_exception_is_shown_with_its_traceback(stream: io.StringIO) -> None:
    logging.configure(program="tester", format=logging.LogFormat.JSON, stream=stream)

    try:
        raise RuntimeError("broken")
    except RuntimeError:
        structlog.get_logger().exception("failed")

    (line,) = lines(stream)
    assert line["level"] == "error"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("RuntimeError: broken")


def test_events_below_the_level_are_not_written(stream: io.StringIO) -> None:
    logging.configure(
        program="tester", level=logging.LogLevel.WARNING, format=logging.LogFormat.JSON, stream=stream
    )

    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")

    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_megabytes_do_not_reach_the_log(stream: io.StringIO) -> None:
    logging.configure(program="tester", format=logging.LogFormat.JSON, stream=stream)

    structlog.get_logger().info("got", name="x" * 10_000_000)

    assert len(stream.getvalue()) < 5000
    assert lines(stream)[0]["name"].endswith("... (10000000 characters)")


def test_automatic_format_is_json_where_there_is_no_terminal(stream: io.StringIO) -> None:
    logging.configure(program="tester", stream=stream)

    structlog.get_logger().info("hello")

    assert lines(stream)[0]["event"] == "hello"


def test_console_format_is_for_people(stream: io.StringIO) -> None:
    logging.configure(program="tester", format=logging.LogFormat.CONSOLE, stream=stream)

    structlog.get_logger().info("hello", count=3)

    assert "hello" in stream.getvalue()
    assert "count=3" in stream.getvalue()
