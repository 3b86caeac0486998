# cython: cdivision=True
"""The ring of a console's last output; see _ring_py.py, whose behaviour this has.

The memory is mapped in one piece and the kernel gives pages as output comes: an idle console takes none.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from hypervisor.ext.console_mux._os cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, iovec, mmap, munmap,
)

cdef enum:
    MIN_SCROLLBACK_BYTES = 16
    MAX_SCROLLBACK_BYTES = 67108864

cdef struct RingData:
    char* data
    int64_t capacity
    int64_t origin
    int64_t end


cdef inline bint ring_init(RingData* ring, int64_t capacity, int64_t position) noexcept nogil:
    """Whether there was memory. ``capacity`` is within its limits, ``position`` within 0..2**62-1."""
    cdef void* data = mmap(
        NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
    )
    ring.data = NULL
    if data == MAP_FAILED:
        return False
    ring.data = <char*>data
    ring.capacity = capacity
    ring.origin = ring.end = position
    return True


cdef inline void ring_free(RingData* ring) noexcept nogil:
    if ring.data != NULL:
        munmap(ring.data, ring.capacity)
        ring.data = NULL


cdef inline int64_t ring_start(const RingData* ring) noexcept nogil:
    cdef int64_t start = ring.end - ring.capacity
    return start if start > ring.origin else ring.origin


cdef inline int64_t ring_replay_position(const RingData* ring, int64_t count) noexcept nogil:
    cdef int64_t start = ring_start(ring)
    return start if count < 0 or ring.end - count < start else ring.end - count


cdef inline int64_t ring_after_skip(const RingData* ring) noexcept nogil:
    return ring_replay_position(ring, ring.capacity // 2)


cdef inline int ring_pieces(const RingData* ring, int64_t position, int64_t size, iovec* pieces) noexcept nogil:
    """Point one or two pieces at ``size`` bytes from ``position`` on; returns how many.

    Invariant of the caller: 0 < size <= capacity and position >= origin, so that both pieces are inside the mapping.
    """
    cdef int64_t at = (position - ring.origin) % ring.capacity
    cdef int64_t first = ring.capacity - at
    pieces[0].iov_base = ring.data + at
    if size <= first:
        pieces[0].iov_len = size
        return 1
    pieces[0].iov_len = first
    pieces[1].iov_base = ring.data
    pieces[1].iov_len = size - first
    return 2


cdef inline void ring_append(RingData* ring, const char* data, int64_t size) noexcept nogil:
    cdef iovec pieces[2]
    cdef int count
    if size > ring.capacity:
        data += size - ring.capacity
        ring.end += size - ring.capacity
        size = ring.capacity
    if size == 0:
        return
    count = ring_pieces(ring, ring.end, size, pieces)
    memcpy(pieces[0].iov_base, data, pieces[0].iov_len)
    if count == 2:
        memcpy(pieces[1].iov_base, data + pieces[0].iov_len, pieces[1].iov_len)
    ring.end += size


cdef inline void ring_copy(const RingData* ring, int64_t position, int64_t size, char* to) noexcept nogil:
    """Copy output that the ring has: start <= position and position + size <= end."""
    cdef iovec pieces[2]
    cdef int count
    if size == 0:
        return
    count = ring_pieces(ring, position, size, pieces)
    memcpy(to, pieces[0].iov_base, pieces[0].iov_len)
    if count == 2:
        memcpy(to + pieces[0].iov_len, pieces[1].iov_base, pieces[1].iov_len)


cdef inline int64_t ring_find(const RingData* ring, int64_t* position, int64_t limit) noexcept nogil:
    """Move ``position`` into the ring and return how many of ``limit`` bytes there are from it on."""
    cdef int64_t start = ring_start(ring)
    if position[0] < start:
        position[0] = start
    if position[0] > ring.end:
        position[0] = ring.end
    return limit if limit < ring.end - position[0] else ring.end - position[0]
