"""The native ring and frame decoder do what their twins specify, for all input."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.ext.console_mux._decoder_py import FrameDecoder
from hypervisor.ext.console_mux._ring_py import Ring
from hypervisor.ext.console_mux._viewer_py import ViewerState
from hypervisor.ext.console_mux.frames import (
    FrameType,
    ProtocolError,
    encode,
    encode_credit,
    encode_input,
    encode_resize,
)

native = pytest.mark.skipif(
    os.environ.get("HYPERVISOR_EXT_PURE") == "1",
    reason="HYPERVISOR_EXT_PURE=1: the compiled module is not used",
)
FRAMES = st.one_of(
    st.binary(max_size=300).map(encode_input),
    st.builds(encode_resize, st.integers(1, 65535), st.integers(1, 65535)),
    st.integers(1, (1 << 63) - 1).map(encode_credit),
)
OTHERS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda kind, payload, code, position: encode(kind, payload, code=code, position=position),
        st.sampled_from(FrameType),
        st.binary(max_size=20),
        st.integers(0, 65535),
        st.integers(0, (1 << 64) - 1),
    ),
)


def _feed(decoder: object, pieces: list[bytes]) -> list[object]:
    seen: list[object] = []
    for piece in pieces:
        try:
            seen.append(decoder.feed(piece))  # type: ignore[attr-defined]
        except ProtocolError:
            seen.append("error")
        seen.append(decoder.buffered)  # type: ignore[attr-defined]
    return seen


def _cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@native
@given(
    st.lists(st.one_of(FRAMES, OTHERS), max_size=12).map(b"".join),
    st.lists(st.integers(0, 60), max_size=20),
    st.booleans(),
)
def test_native_and_twin_decode_alike(data: bytes, sizes: list[int], from_viewer: bool) -> None:
    from hypervisor.ext.console_mux import _mux_c

    pieces = _cut(data, sizes)

    assert _feed(_mux_c.FrameDecoder(from_viewer=from_viewer), pieces) == _feed(
        FrameDecoder(from_viewer=from_viewer), pieces
    )


@given(st.lists(FRAMES, max_size=12), st.lists(st.integers(0, 60), max_size=20))
def test_frames_survive_any_chopping(frames: list[bytes], sizes: list[int]) -> None:
    decoder = FrameDecoder(from_viewer=True)

    seen = [frame for piece in _cut(b"".join(frames), sizes) for frame in decoder.feed(piece)]

    assert [encode(f.type, f.payload, code=f.code, position=f.position) for f in seen] == frames
    assert decoder.buffered == 0


@native
@given(
    capacity=st.integers(16, 300),
    position=st.integers(0, 1 << 40),
    steps=st.lists(
        st.tuples(st.binary(max_size=400), st.integers(-5, 900), st.integers(-1, 400)), max_size=20
    ),
)
def test_native_and_twin_keep_the_same_ring(
    capacity: int, position: int, steps: list[tuple[bytes, int, int]]
) -> None:
    from hypervisor.ext.console_mux import _mux_c

    mine, twin, written = _mux_c.Ring(capacity, position=position), Ring(capacity, position=position), b""
    for data, back, limit in steps:
        mine.append(data)
        twin.append(data)
        written += data
        assert (mine.start, mine.end, mine.after_skip()) == (twin.start, twin.end, twin.after_skip())
        assert mine.replay_position(back) == twin.replay_position(back)
        assert mine.read(twin.end - back, limit) == twin.read(twin.end - back, limit)
        kept = twin.read(twin.start, capacity).data
        assert kept == (written[-len(kept) :] if kept else b"")
        assert len(kept) == min(len(written), capacity)


@given(
    capacity=st.integers(600, 2000),
    framed=st.booleans(),
    steps=st.lists(st.tuples(st.binary(max_size=900), st.floats(0, 1)), max_size=40),
)
def test_a_viewer_sees_the_output_less_what_it_was_told_it_lost(
    capacity: int, framed: bool, steps: list[tuple[bytes, float]]
) -> None:
    ring, written, wire = Ring(capacity), b"", b""
    state = ViewerState(ring, framed=framed, position=0)
    for data, share in [*steps, *[(b"", 1.0)] * 4]:
        ring.append(data)
        written += data
        offered = b"".join(state.plan()[0])
        if offered:
            count = int(len(offered) * share)
            state.took(count)
            wire += offered[:count]

    assert state.sent == len(wire)
    if not framed:
        assert state.skipped or wire == written
        return
    at = lost = 0
    for frame in FrameDecoder(from_viewer=False).feed(wire):
        if frame.type is FrameType.SKIPPED:
            lost += int.from_bytes(frame.payload, "little")
            at = frame.position
        else:
            assert frame.payload == written[at : at + len(frame.payload)]
            at += len(frame.payload)
    assert at == len(written)
    assert lost == state.skipped
