# cython: cdivision=True
"""The native multiplexer's thread: what viewers send, and epoll's news to whom they concern; see _loop_py.py."""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from hypervisor.ext.console_mux._engine cimport (
    EVENT_RESIZED, ROLE_BITS, ROLE_GUEST, ROLE_INPUT, ROLE_VIEWER, ROLE_WAKE, VIEWER_CLOSED, VIEWER_PROTOCOL_ERROR,
    Console, Mux, Viewer, id_find, mux_lock, mux_unlock, tell,
)
from hypervisor.ext.console_mux._frames cimport (
    DECODER_FRAME, DECODER_MORE, DECODER_NO_MEMORY, FRAME_CREDIT, FRAME_INPUT, FRAME_INPUT_DONE, INPUT_ACCEPTED,
    INPUT_FULL, INPUT_NO_GUEST, INPUT_READ_ONLY, MAX_INPUT_BYTES, decoder_next,
)
from hypervisor.ext.console_mux._guests cimport flush, guest_ready, input_ready, input_room, type_in
from hypervisor.ext.console_mux._os cimport (
    EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, MSG_DONTWAIT, TIOCSWINSZ, epoll_event, epoll_wait, ioctl, monotonic_ns, recv,
    winsize,
)
from hypervisor.ext.console_mux._viewer cimport viewer_answer, viewer_grant
from hypervisor.ext.console_mux._viewers cimport close_viewer, pump, viewer_watch

cdef enum:
    BATCH = 128
    ANSWERS_BYTES = 4096        # one that leaves more than this of what it was sent unread is not listened to


cdef inline bint guest_resize(Console* console, int rows, int columns) noexcept nogil:
    """Set the size of the guest's terminal; False with errno set."""
    cdef winsize size
    size.ws_row = <unsigned short>rows
    size.ws_col = <unsigned short>columns
    size.ws_xpixel = size.ws_ypixel = 0
    return ioctl(console.read_fd, TIOCSWINSZ, &size) == 0


cdef inline bint heard_input(Mux* mux, Viewer* viewer, const char* data, size_t size) noexcept nogil:
    """Answer one INPUT frame; False without memory. The viewer may be gone, and freed, after this."""
    cdef Console* console = viewer.console
    cdef uint64_t id = viewer.id
    cdef int64_t accepted = 0
    cdef int result = INPUT_ACCEPTED
    if viewer.read_only:
        result = INPUT_READ_ONLY
    elif console.write_fd < 0:
        result = INPUT_NO_GUEST
    else:
        accepted = type_in(mux, console, data, size)
        # A guest that is found gone is told to those that wait for it, and this one may not survive being told.
        if id_find(mux, id, True) == NULL:
            return True
        if <size_t>accepted != size:
            result = INPUT_FULL
            viewer.wants_room = True
    return viewer_answer(&viewer.state, FRAME_INPUT_DONE, result, accepted)


cdef inline void decode(Mux* mux, Viewer* viewer, const char* data, size_t size) noexcept nogil:
    cdef const char* payload = NULL
    cdef int result, rows, columns
    cdef uint64_t id = viewer.id
    while True:
        result = decoder_next(&viewer.decoder, &data, &size, &payload)
        if result != DECODER_FRAME:
            break
        if viewer.decoder.frame.kind == FRAME_CREDIT:
            viewer_grant(&viewer.state, viewer.decoder.frame.position)
        elif viewer.decoder.frame.kind == FRAME_INPUT:
            if not heard_input(mux, viewer, payload, viewer.decoder.frame.length):
                result = DECODER_NO_MEMORY
                break
            if id_find(mux, id, True) == NULL:
                return
        elif viewer.may_resize:
            rows = viewer.decoder.frame.code
            columns = <int>viewer.decoder.frame.position
            if viewer.console.is_terminal:
                guest_resize(viewer.console, rows, columns)
            tell(mux, EVENT_RESIZED, viewer.console.id, viewer.id, &viewer.resized, 0, rows, columns)
    if result != DECODER_MORE:
        close_viewer(mux, viewer, VIEWER_CLOSED if result == DECODER_NO_MEMORY else VIEWER_PROTOCOL_ERROR)
    elif not viewer.blocked:
        pump(mux, viewer)


cdef inline void hear(Mux* mux, Viewer* viewer) noexcept nogil:
    """Read a piece of what a viewer sends. It may be freed after this."""
    cdef Console* console = viewer.console
    cdef size_t limit = MAX_INPUT_BYTES
    cdef bint types = not viewer.framed and not viewer.read_only and console.write_fd >= 0
    cdef ssize_t size
    if types:
        limit = min(limit, input_room(console))
    elif viewer.framed and viewer.state.out_size > ANSWERS_BYTES:
        limit = 0
    if limit == 0:
        viewer.paused = True
        viewer_watch(mux, viewer)
        return
    size = recv(viewer.fd, mux.scratch, limit, MSG_DONTWAIT)
    if size < 0:
        if errno != EAGAIN and errno != EINTR:
            close_viewer(mux, viewer, VIEWER_CLOSED)
    elif size == 0 and viewer.framed:
        close_viewer(mux, viewer, VIEWER_CLOSED)
    elif size == 0:
        viewer.deaf = True
        viewer_watch(mux, viewer)
    elif types:
        type_in(mux, console, mux.scratch, size)
    elif viewer.framed:
        decode(mux, viewer, mux.scratch, size)


cdef inline void viewer_ready(Mux* mux, Viewer* viewer, uint32_t mask) noexcept nogil:
    cdef uint64_t id = viewer.id
    cdef bint hears = not viewer.deaf
    if mask & EPOLLOUT:
        if not pump(mux, viewer):
            return
        if viewer.paused and viewer.framed and viewer.state.out_size <= ANSWERS_BYTES:
            viewer.paused = False
            viewer_watch(mux, viewer)
    if mask & EPOLLIN:
        hear(mux, viewer)
    if mask & (EPOLLERR | EPOLLHUP) and not (mask & EPOLLIN and hears) and id_find(mux, id, True) != NULL:
        close_viewer(mux, viewer, VIEWER_CLOSED)


cdef inline void dispatch(Mux* mux, uint64_t key, uint32_t mask) noexcept nogil:
    cdef int role = <int>(key & ((1 << ROLE_BITS) - 1))
    cdef void* record = id_find(mux, key >> ROLE_BITS, role == ROLE_VIEWER)
    if record == NULL or role == ROLE_WAKE:
        return
    if role == ROLE_VIEWER:
        viewer_ready(mux, <Viewer*>record, mask)
    elif role == ROLE_GUEST:
        if (<Console*>record).read_fd >= 0:
            guest_ready(mux, <Console*>record, mask)
    elif (<Console*>record).write_fd >= 0:
        input_ready(mux, <Console*>record, mask)


cdef inline void* mux_run(void* argument) noexcept nogil:
    """The thread: serve until stopped. The lock is given up between any two descriptors."""
    cdef Mux* mux = <Mux*>argument
    cdef epoll_event events[BATCH]
    cdef int count, i, pause
    cdef int64_t now_ns
    mux_lock(mux)
    while not mux.stopping:
        pause = -1
        if mux.due_first != NULL:
            now_ns = monotonic_ns()
            while mux.due_first != NULL and mux.due_first.due_ns <= now_ns:
                flush(mux, mux.due_first, now_ns)
            if mux.due_first != NULL:
                pause = <int>((mux.due_first.due_ns - now_ns) // 1000000) + 1
        mux_unlock(mux)
        count = epoll_wait(mux.epoll, events, BATCH, pause)
        for i in range(count):
            mux_lock(mux)
            if not mux.stopping:
                dispatch(mux, events[i].data.u64, events[i].events)
            mux_unlock(mux)
        mux_lock(mux)
    mux_unlock(mux)
    return NULL
