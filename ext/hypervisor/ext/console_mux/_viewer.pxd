"""What a viewer is to be sent next, without I/O; see _viewer_py.py, whose behaviour this has."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from hypervisor.ext.console_mux._frames cimport (
    FRAME_DATA, FRAME_ENDED, FRAME_SKIPPED, HEADER_BYTES, MAX_DATA_BYTES, frame_put,
)
from hypervisor.ext.console_mux._os cimport htole64, iovec
from hypervisor.ext.console_mux._ring cimport RingData, ring_after_skip, ring_copy, ring_pieces, ring_start

cdef enum:
    OUT_SMALL_BYTES = 256
    OUT_KEPT_BYTES = 256
    MARKER_BYTES = 64
    PLAN_PIECES = 4

cdef struct ViewerState:
    RingData* ring
    bint framed
    bint said_end
    int reason
    int64_t position
    int64_t credit
    int64_t ends_at
    int64_t skipped
    int64_t sent
    char* out
    size_t out_size
    size_t out_capacity
    char header[16]
    size_t header_size
    int64_t length


cdef inline void viewer_init(
    ViewerState* state, RingData* ring, bint framed, int64_t position, int64_t credit
) noexcept nogil:
    state.ring = ring
    state.framed = framed
    state.said_end = False
    state.reason = 0
    state.position = position
    state.credit = credit if framed else -1
    state.ends_at = -1
    state.skipped = state.sent = 0
    state.out = NULL
    state.out_size = state.out_capacity = state.header_size = 0
    state.length = 0


cdef inline void viewer_free(ViewerState* state) noexcept nogil:
    free(state.out)
    state.out = NULL
    state.out_size = state.out_capacity = 0


cdef inline bint out_reserve(ViewerState* state, size_t more) noexcept nogil:
    """Whether ``more`` bytes fit into ``out`` now."""
    cdef size_t wanted = state.out_size + more
    cdef void* moved
    if wanted <= state.out_capacity:
        return True
    if wanted < 64:
        wanted = 64
    moved = realloc(state.out, wanted)
    if moved == NULL:
        return False
    state.out = <char*>moved
    state.out_capacity = wanted
    return True


cdef inline void out_drop(ViewerState* state, size_t count) noexcept nogil:
    """Forget the first ``count`` bytes of ``out``, and its memory where that is more than a little."""
    state.out_size -= count
    if state.out_size > 0:
        memmove(state.out, state.out + count, state.out_size)
    elif state.out_capacity > OUT_KEPT_BYTES:
        viewer_free(state)


cdef inline bint viewer_answer(ViewerState* state, int kind, int code, int64_t position) noexcept nogil:
    """Put a frame without payload in front of the output to come; False without memory."""
    if not out_reserve(state, HEADER_BYTES):
        return False
    frame_put(state.out + state.out_size, kind, code, 0, position)
    state.out_size += HEADER_BYTES
    return True


cdef inline void viewer_end(ViewerState* state, int reason) noexcept nogil:
    if state.ends_at < 0:
        state.ends_at = state.ring.end
        state.reason = reason


cdef inline void viewer_grant(ViewerState* state, int64_t count) noexcept nogil:
    cdef int64_t most = (<int64_t>1 << 62) - 1
    if state.credit >= 0:
        state.credit = most if count > most - state.credit else state.credit + count


cdef inline bint viewer_finished(const ViewerState* state) noexcept nogil:
    return state.said_end and state.out_size == 0


cdef inline size_t skip_marker(char* to, int64_t count) noexcept nogil:
    """Write at most MARKER_BYTES: what stands in the text in place of ``count`` bytes."""
    return snprintf(to, MARKER_BYTES, b"\r\n[... %lld bytes skipped ...]\r\n", <long long>count)


cdef inline bint viewer_skip(ViewerState* state, int64_t to) noexcept nogil:
    cdef int64_t lost = to - state.position
    cdef uint64_t lost_le = htole64(<uint64_t>lost)
    if not out_reserve(state, MARKER_BYTES):
        return False
    if state.framed:
        frame_put(state.out + state.out_size, FRAME_SKIPPED, 0, 8, to)
        memcpy(state.out + state.out_size + HEADER_BYTES, &lost_le, 8)
        state.out_size += HEADER_BYTES + 8
    else:
        state.out_size += skip_marker(state.out + state.out_size, lost)
    state.position = to
    state.skipped += lost
    return True


cdef inline int64_t viewer_plan(ViewerState* state, iovec* pieces, int* count) noexcept nogil:
    """Point at most PLAN_PIECES pieces at what to send now; returns their bytes, or -1 without memory."""
    cdef RingData* ring = state.ring
    cdef int64_t end = ring.end if state.ends_at < 0 else state.ends_at
    cdef int64_t to
    cdef int used = 0
    state.header_size = 0
    state.length = 0
    if state.out_size <= OUT_SMALL_BYTES:
        if state.position < ring_start(ring) and state.position < end and state.credit != 0:
            to = min(ring_after_skip(ring), end)
            if not viewer_skip(state, to):
                return -1
        state.length = min(<int64_t>MAX_DATA_BYTES, end - state.position)
        if state.credit >= 0 and state.length > state.credit:
            state.length = state.credit
        if state.length <= 0:
            state.length = 0
            if state.ends_at >= 0 and state.position >= end and not state.said_end:
                if state.framed and not viewer_answer(state, FRAME_ENDED, state.reason, end):
                    return -1
                state.said_end = True
    if state.out_size > 0:
        pieces[used].iov_base = state.out
        pieces[used].iov_len = state.out_size
        used += 1
    if state.length > 0:
        if state.framed:
            frame_put(state.header, FRAME_DATA, 0, <unsigned int>state.length, state.position)
            state.header_size = HEADER_BYTES
            pieces[used].iov_base = state.header
            pieces[used].iov_len = HEADER_BYTES
            used += 1
        # start <= position and position + length <= end: the skip above and the minimum see to it.
        used += ring_pieces(ring, state.position, state.length, pieces + used)
    count[0] = used
    return <int64_t>state.out_size + <int64_t>state.header_size + state.length


cdef inline int viewer_took(ViewerState* state, int64_t count) noexcept nogil:
    """The socket took ``count`` bytes of the plan; 1: all of it, 0: not all, -1: no memory to keep the rest of a frame.

    The ring must not have moved since the plan.
    """
    cdef int64_t total = <int64_t>state.out_size + <int64_t>state.header_size + state.length
    cdef bint complete = count == total
    cdef int64_t header_left, data_at
    state.sent += count
    if count < <int64_t>state.out_size:
        out_drop(state, count)
        return False
    count -= state.out_size
    if state.out_size > 0:
        out_drop(state, state.out_size)
    if count == 0:
        return complete
    if not state.framed:
        state.position += count
        return complete
    if not complete:
        header_left = max(<int64_t>0, HEADER_BYTES - count)
        data_at = max(<int64_t>0, count - HEADER_BYTES)
        if not out_reserve(state, header_left + state.length - data_at):
            return -1
        memcpy(state.out, state.header + HEADER_BYTES - header_left, header_left)
        ring_copy(state.ring, state.position + data_at, state.length - data_at, state.out + header_left)
        state.out_size = header_left + state.length - data_at
    state.position += state.length
    if state.credit >= 0:
        state.credit -= state.length
    return complete
