"""Packets between agent and console holder: whatever comes is a message or a ProtocolError, never anything else."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hypervisor.agent.console_holder import protocol

_NAMES = st.text(max_size=30)
_NUMBERS = st.integers(-(2**63), 2**63 - 1)
_REQUESTS = st.one_of(
    st.builds(protocol.Hello, _NUMBERS),
    st.builds(protocol.Open, _NAMES, _NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS),
    st.builds(protocol.Attach, _NAMES, _NAMES, st.booleans()),
    st.builds(protocol.View, _NAMES, _NUMBERS, st.booleans(), _NUMBERS),
    st.builds(protocol.Locate, _NAMES, _NUMBERS, _NUMBERS),
    st.builds(protocol.Read, _NAMES, _NUMBERS, _NUMBERS),
    st.builds(protocol.Resize, _NAMES, _NUMBERS, _NUMBERS),
    st.builds(protocol.EndViewers, _NAMES, _NUMBERS),
    st.builds(protocol.Forget, _NAMES, _NUMBERS),
    st.builds(protocol.Retain, st.lists(_NAMES).map(tuple)),
    st.builds(protocol.Bye),
    st.builds(protocol.Stop),
)


@given(_NUMBERS, _REQUESTS)
def test_requests_come_out_as_they_went_in(number: int, request: protocol.Request) -> None:
    assert protocol.decode_request(protocol.encode_request(number, request)) == (number, request)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    try:
        number, request = protocol.decode_request(data)
    except protocol.ProtocolError:
        return
    assert protocol.decode_request(protocol.encode_request(number, request)) == (number, request)


@example(b"\x91\xa5\x00\x00\x00\x00\x80")  # text that is not UTF-8
@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_an_error(data: bytes) -> None:
    try:
        answer = protocol.decode_answer(data)
    except protocol.ProtocolError:
        return
    assert protocol.decode_answer(protocol.encode(answer)) == answer


def test_a_deep_message_is_an_error() -> None:
    with pytest.raises(protocol.ProtocolError):
        protocol.decode_request(b"\x91" * 10_000)
