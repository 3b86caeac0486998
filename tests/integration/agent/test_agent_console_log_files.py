"""Log files of a console: names are positions, and times find them."""

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent.console_holder.log_files import ConsoleLog, LogLimits
from hypervisor.agent.console_holder.time_index import (
    MARKS,
    Mark,
    Marker,
    decode_marks,
    encode_mark,
    position_at,
)

SECOND = 1_000_000_000


def _log(directory: Path, *, file_bytes: int = 10, files: int = 3) -> ConsoleLog:
    return ConsoleLog(directory / "i-1", LogLimits(file_bytes, files))


def _file(log: ConsoleLog, position: int, data: bytes) -> None:
    fd = log.new_file()
    os.write(fd, data)
    os.close(fd)
    log.name_new(position)


def test_what_is_written_is_read_from_any_position(tmp_path: Path) -> None:
    log = _log(tmp_path)
    _file(log, 0, b"0123456789")
    _file(log, 10, b"abcdefghij")

    assert (log.start, log.end) == (0, 20)
    assert log.read(7, 100).data == b"789"
    assert log.read(10, 4).data == b"abcd"
    assert log.read(20, 100).data == b""
    assert log.tail(13) == b"789abcdefghij"
    log.close()


def test_the_oldest_files_go(tmp_path: Path) -> None:
    log = _log(tmp_path, files=2)
    for number in range(4):
        _file(log, number * 10, b"0123456789")

    assert (log.start, log.end) == (20, 40)
    assert log.read(3, 5).position == 20
    assert len(list((tmp_path / "i-1").glob("*.log"))) == 2
    assert len(list((tmp_path / "i-1").glob("*.idx"))) == 2
    log.close()


def test_another_process_goes_on_where_the_newest_file_ends(tmp_path: Path) -> None:
    log = _log(tmp_path)
    _file(log, 100, b"01234")
    log.close()

    again = _log(tmp_path)

    assert again.end == 105
    continued = again.continue_newest(105)
    assert continued is not None
    fd, size = continued
    os.write(fd, b"56")
    os.close(fd)
    assert (size, again.end, again.read(100, 10).data) == (5, 107, b"0123456")
    assert again.continue_newest(300) is None
    again.close()


def test_a_full_file_is_not_continued(tmp_path: Path) -> None:
    log = _log(tmp_path)
    _file(log, 0, b"0123456789")

    assert log.continue_newest(10) is None
    log.close()


def test_output_that_was_lost_between_files_is_a_gap(tmp_path: Path) -> None:
    log = _log(tmp_path)
    _file(log, 0, b"01234")
    _file(log, 50, b"abc")

    piece = log.read(5, 10)

    assert (piece.position, piece.data) == (50, b"abc")
    assert log.tail(100) == b"abc"
    log.close()


def test_a_file_that_is_longer_than_its_positions_is_cut(tmp_path: Path) -> None:
    log = _log(tmp_path)
    _file(log, 0, b"0123\r\n[... 2 bytes skipped ...]\r\n")
    _file(log, 6, b"abc")

    assert log.read(0, 100).data == b"0123\r\n"
    assert log.read(6, 100).data == b"abc"
    log.close()


def test_times_are_found_across_files_and_processes(tmp_path: Path) -> None:
    log = _log(tmp_path, file_bytes=4096)
    _file(log, 0, b"x" * 100)
    log.note(0, 10 * SECOND)
    log.note(50, 20 * SECOND)
    _file(log, 100, b"x" * 100)
    log.note(150, 30 * SECOND)
    log.close()

    again = _log(tmp_path, file_bytes=4096)

    assert again.position_at(5 * SECOND) is None
    assert again.position_at(20 * SECOND) == 50
    assert again.position_at(29 * SECOND) == 50
    assert again.position_at(99 * SECOND) == 150


def test_marks_are_a_second_and_a_share_of_the_file_apart() -> None:
    marker = Marker(file_bytes=MARKS * 10)

    assert marker.note(0, 0) is not None
    assert marker.note(100, SECOND // 2) is None
    assert marker.note(9, 5 * SECOND) is None
    assert marker.note(10, 5 * SECOND) is not None


def test_a_clock_that_was_set_back_gives_more_rather_than_less() -> None:
    marks = (Mark(0, 10), Mark(1, 20), Mark(2, 5), Mark(3, 30))

    assert position_at(marks, 12) == 0
    assert position_at(marks, 40) == 3


@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62))), st.integers(0, 15))
def test_marks_survive_their_file_whatever_is_cut_off(pairs: list[tuple[int, int]], cut: int) -> None:
    marks = [Mark(*pair) for pair in pairs]
    data = b"".join(encode_mark(mark) for mark in marks)

    kept = list(decode_marks(data[: len(data) - cut] if cut else data))

    assert kept == (marks if not cut else marks[: max(0, len(marks) - 1)])
