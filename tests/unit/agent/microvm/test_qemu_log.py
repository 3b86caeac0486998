"""How a run of QEMU ended, by its exit code and its log."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent.drivers.microvm.qemu_log import explain_end, last_words
from hypervisor.agent.drivers.microvm.vmm import End


def cause(number: int) -> str:
    return f"qemu_system_shutdown_request reason={number}\n"


@pytest.mark.parametrize(("number", "word"), [(2, "QEMU"), (4, "QEMU"), (6, "guest"), (7, "guest")])
@pytest.mark.parametrize("code", [0, None])
def test_an_orderly_end_is_one_whether_somebody_could_wait_for_it_or_not(
    number: int, word: str, code: int | None
) -> None:
    end = explain_end(cause(number), code)

    assert (end.crashed, end.exit_code) == (False, 0)
    assert word in end.message


@pytest.mark.parametrize("code", [1, None])
def test_a_panic_is_a_crash(code: int | None) -> None:
    end = explain_end(cause(8), code)

    assert (end.crashed, end.exit_code) == (True, 1)
    assert "panicked" in end.message


def test_events_may_have_a_process_and_a_time_before_them() -> None:
    log = "12@1700000000.5:qemu_system_shutdown_request reason=8\n"

    assert "panicked" in explain_end(log, None).message


def test_the_last_cause_counts() -> None:
    assert explain_end(cause(6) + cause(8), 1).crashed


def test_a_signal_is_named() -> None:
    assert explain_end("", 137) == End(True, 137, "QEMU was ended by SIGKILL")
    assert explain_end(cause(6), 139).message == "QEMU crashed (SIGSEGV)"
    assert explain_end("qemu-system-x86_64: x: Assertion failed", 134).message.endswith(
        "(SIGABRT): x: Assertion failed"
    )
    assert "signal 99" in explain_end("", 128 + 99).message


def test_an_error_of_qemu_is_told_in_its_words() -> None:
    log = "qemu-system-x86_64: warning: slow\nqemu-system-x86_64: -device x: no such device\n"

    end = explain_end(log, 1)

    assert (end.crashed, end.exit_code) == (True, 1)
    assert end.message == "QEMU ended with an error: -device x: no such device"


def test_an_error_without_words_is_told_by_its_code() -> None:
    assert explain_end("", 1).message == "QEMU ended with an error: exit code 1"


def test_an_end_that_nobody_saw_and_no_log_tells_of_is_a_crash() -> None:
    assert explain_end("", None) == End(True, None, "QEMU ended without saying why")
    assert explain_end("qemu-system-x86_64: out of x\n", None).message.endswith("its last words: out of x")


def test_a_cause_that_is_not_known_here_is_judged_by_the_exit_code() -> None:
    assert not explain_end(cause(77), 0).crashed
    assert explain_end(cause(77), 1).crashed


def test_long_words_are_cut() -> None:
    assert len(last_words("x" * 10_000)) < 300


@given(st.text(), st.none() | st.integers(0, 255))
def test_no_log_breaks_it(log: str, code: int | None) -> None:
    end = explain_end(log, code)

    assert end.crashed or end.exit_code == 0
    assert end.message
