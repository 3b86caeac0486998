# cython: cdivision=True
"""Guests: their output into the ring and on to viewers and log, typed bytes to them; see _loop_py.py."""

from libc.errno cimport EAGAIN, EINTR, EIO, EPIPE, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from hypervisor.ext.console_mux._engine cimport (
    EVENT_GUEST_GONE, EVENT_INPUT_CLOSED, EVENT_INPUT_READY, ROLE_GUEST, ROLE_INPUT, VIEWER_CLOSED, Console, Mux,
    Viewer, changed_add, due_add, due_remove, tell, unwatch, watch,
)
from hypervisor.ext.console_mux._frames cimport FRAME_INPUT_READY, MAX_DATA_BYTES, MAX_INPUT_BYTES
from hypervisor.ext.console_mux._logs cimport log_enqueue
from hypervisor.ext.console_mux._os cimport (
    EPOLL_CTL_MOD, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, close, iovec, monotonic_ns, poll, pollfd, readv, write,
)
from hypervisor.ext.console_mux._ring cimport ring_pieces
from hypervisor.ext.console_mux._viewer cimport viewer_answer
from hypervisor.ext.console_mux._viewers cimport close_viewer, pump, viewer_watch

cdef enum:
    INPUT_QUEUE_BYTES = 65536
    INPUT_MUCH_ROOM = 32768
    READS = 16                  # of one terminal in a row before it is another's turn


cdef inline void say_room(Mux* mux, Console* console) noexcept nogil:
    """Tell those that were refused input that there is room, or nobody to type to any more."""
    cdef Viewer* viewer = console.viewers
    cdef Viewer* following
    if console.wants_room:
        console.wants_room = False
        tell(mux, EVENT_INPUT_READY, console.id, 0, &console.events[<int>EVENT_INPUT_READY], 0, 0, 0)
    while viewer != NULL:
        following = viewer.next
        if viewer.paused:
            viewer.paused = False
            viewer_watch(mux, viewer)
        if viewer.wants_room:
            viewer.wants_room = False
            if not viewer_answer(&viewer.state, FRAME_INPUT_READY, 0, 0):
                close_viewer(mux, viewer, VIEWER_CLOSED)
            elif not viewer.blocked:
                pump(mux, viewer)
        viewer = following


cdef inline void input_clear(Console* console) noexcept nogil:
    free(console.input)
    console.input = NULL
    console.input_at = console.input_size = 0


cdef inline size_t input_room(const Console* console) noexcept nogil:
    return INPUT_QUEUE_BYTES - console.input_size


cdef inline void detach_guest(Mux* mux, Console* console) noexcept nogil:
    """Close the guest's descriptors; writers that wait hear of it."""
    if console.read_fd >= 0:
        unwatch(mux, console.read_fd)
        close(console.read_fd)
    if console.write_fd >= 0 and console.write_fd != console.read_fd:
        unwatch(mux, console.write_fd)
        close(console.write_fd)
    console.read_fd = console.write_fd = -1
    console.read_mask = console.write_mask = 0
    console.is_terminal = False
    input_clear(console)
    say_room(mux, console)


cdef inline void watch_write(Mux* mux, Console* console) noexcept nogil:
    cdef uint32_t wanted = 0
    if console.input_size > 0:
        wanted = EPOLLOUT
    if console.write_fd == console.read_fd:
        wanted |= EPOLLIN
        if wanted != console.read_mask:
            console.read_mask = wanted
            watch(mux, EPOLL_CTL_MOD, console.read_fd, wanted, console.id, ROLE_GUEST)
    elif wanted != console.write_mask:
        console.write_mask = wanted
        watch(mux, EPOLL_CTL_MOD, console.write_fd, wanted, console.id, ROLE_INPUT)


cdef inline void close_input(Mux* mux, Console* console, int error) noexcept nogil:
    """The guest takes no more: forget the queue; the output goes on to be read."""
    if console.write_fd >= 0 and console.write_fd != console.read_fd:
        unwatch(mux, console.write_fd)
        close(console.write_fd)
    console.write_fd = -1
    console.write_mask = 0
    input_clear(console)
    if console.read_fd >= 0 and console.read_mask != EPOLLIN:
        console.read_mask = EPOLLIN
        watch(mux, EPOLL_CTL_MOD, console.read_fd, EPOLLIN, console.id, ROLE_GUEST)
    tell(mux, EVENT_INPUT_CLOSED, console.id, 0, &console.events[<int>EVENT_INPUT_CLOSED], error, 0, 0)
    say_room(mux, console)


cdef inline void type_out(Mux* mux, Console* console) noexcept nogil:
    """Give the guest what it takes of the queue."""
    cdef size_t part
    cdef ssize_t count
    if console.write_fd < 0:
        return
    while console.input_size > 0:
        part = min(console.input_size, INPUT_QUEUE_BYTES - console.input_at)
        count = write(console.write_fd, console.input + console.input_at, part)
        if count < 0:
            if errno == EAGAIN or errno == EINTR:
                break
            close_input(mux, console, errno)
            return
        console.input_bytes += count
        console.input_at = (console.input_at + count) % INPUT_QUEUE_BYTES
        console.input_size -= count
    if console.input_size == 0:
        input_clear(console)
    watch_write(mux, console)
    if input_room(console) >= INPUT_MUCH_ROOM:
        say_room(mux, console)


cdef inline int64_t input_offer(Console* console, const char* data, size_t size) noexcept nogil:
    """Queue typed bytes: at most MAX_INPUT_BYTES whole or not at all, more as far as they go; returns how many."""
    cdef size_t room = input_room(console), at, first
    if size > room:
        if size <= MAX_INPUT_BYTES:
            return 0
        size = room
    if size == 0:
        return 0
    if console.input == NULL:
        console.input = <char*>malloc(INPUT_QUEUE_BYTES)
        if console.input == NULL:
            return 0
    at = (console.input_at + console.input_size) % INPUT_QUEUE_BYTES
    first = min(size, INPUT_QUEUE_BYTES - at)
    memcpy(console.input + at, data, first)
    memcpy(console.input, data + first, size - first)
    console.input_size += size
    return size


cdef inline int64_t type_in(Mux* mux, Console* console, const char* data, size_t size) noexcept nogil:
    """Queue typed bytes and give the guest what it takes; returns how many were accepted.

    The usual case goes by the queue: it is empty, and the guest takes the bytes from where they are.
    """
    cdef int64_t accepted = 0
    cdef ssize_t count
    if console.input_size == 0 and size > 0:
        count = write(console.write_fd, data, min(size, <size_t>INPUT_QUEUE_BYTES))
        if count < 0:
            if errno != EAGAIN and errno != EINTR:
                close_input(mux, console, errno)
                return size
            count = 0
        console.input_bytes += count
        accepted = count
        if <size_t>accepted == size:
            return accepted
        # The rest of a write that was begun always goes in: the queue is empty.
        accepted += input_offer(console, data + count, size - count)
        watch_write(mux, console)
        return accepted
    return input_offer(console, data, size)


cdef inline void flush(Mux* mux, Console* console, int64_t now_ns) noexcept nogil:
    """Offer the output to the viewers and the log."""
    cdef Viewer* viewer = console.viewers
    cdef Viewer* following
    due_remove(mux, console)
    console.flushed = console.ring.end
    console.flushed_ns = now_ns
    while viewer != NULL:
        following = viewer.next
        if not viewer.blocked:
            pump(mux, viewer)
        viewer = following
    log_enqueue(mux, console)


cdef inline void guest_gone(Mux* mux, Console* console, int error) noexcept nogil:
    cdef bint at_end = error == EIO and console.is_terminal
    flush(mux, console, monotonic_ns())
    detach_guest(mux, console)
    tell(
        mux, EVENT_GUEST_GONE, console.id, 0, &console.events[<int>EVENT_GUEST_GONE], 0 if at_end else error, 0, 0
    )


cdef inline void read_guest(Mux* mux, Console* console) noexcept nogil:
    """Read a piece straight into the ring."""
    cdef iovec pieces[2]
    cdef int64_t most = min(<int64_t>MAX_DATA_BYTES, console.ring.capacity)
    cdef int64_t now_ns, got = 0
    cdef int count, reads = 0
    cdef ssize_t size = 0
    # A pty gives little at a time: as long as it has more, epoll need not be asked in between.
    while reads < READS and got < most:
        count = ring_pieces(&console.ring, console.ring.end, most - got, pieces)
        size = readv(console.read_fd, pieces, count)
        if size <= 0:
            break
        console.ring.end += size
        got += size
        reads += 1
        if not console.is_terminal:
            break
    if got == 0:
        if size < 0 and (errno == EAGAIN or errno == EINTR):
            return
        guest_gone(mux, console, errno if size < 0 else 0)
        return
    changed_add(mux, console)
    now_ns = monotonic_ns()
    if (
        now_ns - console.flushed_ns >= mux.coalesce_ns
        or console.ring.end - console.flushed >= min(<int64_t>MAX_DATA_BYTES, console.ring.capacity // 2)
    ):
        flush(mux, console, now_ns)
    else:
        due_add(mux, console, now_ns)


cdef inline void guest_ready(Mux* mux, Console* console, uint32_t mask) noexcept nogil:
    if mask & EPOLLOUT:
        type_out(mux, console)
    if mask & (EPOLLIN | EPOLLERR | EPOLLHUP) and console.read_fd >= 0:
        read_guest(mux, console)


cdef inline void input_ready(Mux* mux, Console* console, uint32_t mask) noexcept nogil:
    cdef pollfd now
    now.fd = console.write_fd
    now.events = 0
    # The news may be of the guest before this one: it is asked again.
    if mask & (EPOLLERR | EPOLLHUP) and poll(&now, 1, 0) == 1:
        close_input(mux, console, EPIPE)
    else:
        type_out(mux, console)
