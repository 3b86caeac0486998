"""Structured logs: one line of JSON each to standard error (or coloured text on a terminal).

``structlog.get_logger()`` is how modules log; the standard library's loggers (grpc, asyncio, aiohttp) are routed
through the same renderer. Context bound with :func:`bind` (request id, instance id) is added to every event of the
task and of the tasks it starts. Event names are snake_case; values are keys, never part of the name.
"""

import enum
import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TextIO

import msgspec
import structlog

__all__ = ["LogFormat", "LogLevel", "bind", "configure"]

MAX_VALUE_CHARACTERS = 2_000
"""Longer values are cut: user input of any size may reach the log."""


class LogLevel(enum.StrEnum):
    """From which severity on events are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(enum.StrEnum):
    """How events are written."""

    JSON = "json"
    """One JSON object a line."""
    CONSOLE = "console"
    """For people."""
    AUTO = "auto"
    """``console`` on a terminal, else ``json``."""


_LEVELS: Mapping[LogLevel, int] = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}

_ENCODER = msgspec.json.Encoder(enc_hook=str)


def _to_json(event: MutableMapping[str, Any], **_: object) -> str:
    return _ENCODER.encode(event).decode()


def _cut_long_values(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > MAX_VALUE_CHARACTERS and key != "exception":
            event[key] = f"{value[:MAX_VALUE_CHARACTERS]}... ({len(value)} characters)"
    return event


def configure(
    *,
    program: str,
    level: LogLevel = LogLevel.INFO,
    format: LogFormat = LogFormat.AUTO,
    stream: TextIO = sys.stderr,
) -> None:
    """Set up logging for the whole process; call once, first thing in ``__main__``.

    ``program`` stands in every line. A second call replaces the first (tests do so).
    """
    number = _LEVELS[level]
    if format is LogFormat.AUTO:
        format = LogFormat.CONSOLE if stream.isatty() else LogFormat.JSON

    def add_program(
        _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event.setdefault("program", program)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        add_program,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.UnicodeDecoder(),
        _cut_long_values,
    ]
    final: list[structlog.typing.Processor]
    if format is LogFormat.JSON:
        final = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_to_json)]
    else:
        final = [structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
    # asyncio reports every slow callback at this level in debug mode; grpc and aiohttp are chatty below a warning.
    for name in ("asyncio", "grpc", "aiohttp.access"):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.captureWarnings(True)


@contextmanager
def bind(**values: str) -> Iterator[None]:
    """Add these keys to every event logged inside, in this task and those it starts."""
    tokens = structlog.contextvars.bind_contextvars(**values)
    try:
        yield
    finally:
        structlog.contextvars.reset_contextvars(**tokens)
