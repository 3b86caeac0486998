# cython: cdivision=True
"""Native twin of _mux_py, _decoder_py and _ring_py: the same names, the same behaviour; one thread without the GIL.

The parts are in .pxd files that are compiled into this module: _ring, _frames, _viewer (no I/O), _engine (records),
_viewers, _guests, _logs, _loop. Here is what Python calls. Contracts are in the docstrings of the twins.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from posix.unistd cimport getpid

import os

from hypervisor.ext.console_mux._types import (
    COALESCE_MS, SCROLLBACK_BYTES, Attached, Chunk, ConsoleStats, Event, EventKind, ViewerEnd, ViewerStats,
)
from hypervisor.ext.console_mux.frames import Frame, FrameType, ProtocolError

from hypervisor.ext.console_mux._engine cimport (
    ROLE_GUEST, ROLE_INPUT, ROLE_VIEWER, ROLE_WAKE, Console, EventNode, Mux, Viewer, changed_remove, due_remove,
    forget_events, free_events, id_find, id_forget, id_new, mux_lock, mux_unlock, take_events, unwatch, watch,
)
from hypervisor.ext.console_mux._frames cimport (
    DECODER_FRAME, DECODER_MORE, DECODER_NO_MEMORY, DecoderData, decoder_buffered, decoder_forget, decoder_init,
    decoder_next,
)
from hypervisor.ext.console_mux._guests cimport detach_guest, type_in
from hypervisor.ext.console_mux._logs cimport (
    LOG_BUFFER_BYTES, log_close, log_enqueue, log_settle, log_start, log_write_out,
)
from hypervisor.ext.console_mux._loop cimport guest_resize, mux_run
from hypervisor.ext.console_mux._os cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLIN, SIG_SETMASK, SO_TYPE, SOCK_STREAM, SOL_SOCKET,
    close, console_mux_has_peer, epoll_create1, eventfd, eventfd_write, getsockopt, isatty, pthread_cond_broadcast,
    pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_create, pthread_join, pthread_mutex_destroy,
    pthread_mutex_init, pthread_setname_np, pthread_sigmask, sigfillset, sigset_t, socklen_t,
)
from hypervisor.ext.console_mux._ring cimport (
    MAX_SCROLLBACK_BYTES, MIN_SCROLLBACK_BYTES, RingData, ring_append, ring_copy, ring_find, ring_free, ring_init,
    ring_replay_position, ring_start, ring_after_skip,
)
from hypervisor.ext.console_mux._viewer cimport viewer_end, viewer_init
from hypervisor.ext.console_mux._viewers cimport QUIET, SCRATCH_BYTES, close_viewer, pump

cdef enum:
    EVENT_KIND_COUNT = 8
cdef int64_t MOST = <int64_t>1 << 62


cdef int check_ring(int64_t capacity, int64_t position) except -1:
    if not MIN_SCROLLBACK_BYTES <= capacity <= MAX_SCROLLBACK_BYTES:
        raise ValueError(f"a scrollback holds {MIN_SCROLLBACK_BYTES} to {MAX_SCROLLBACK_BYTES} bytes")
    if not 0 <= position < MOST:
        raise ValueError("a position is within 0..2**62-1")
    return 0


cdef object read_ring(const RingData* ring, int64_t position, int64_t limit):
    """A Chunk; ``limit`` may be anything."""
    cdef int64_t at = position
    cdef int64_t size = max(<int64_t>0, ring_find(ring, &at, limit))
    data = PyBytes_FromStringAndSize(NULL, size)
    ring_copy(ring, at, size, PyBytes_AS_STRING(data))
    return Chunk(data, max(<int64_t>0, at - position), at + size)


cdef class Ring:
    cdef RingData ring

    def __cinit__(self, int64_t capacity, *, int64_t position=0):
        check_ring(capacity, position)
        if not ring_init(&self.ring, capacity, position):
            raise MemoryError

    def __dealloc__(self):
        ring_free(&self.ring)

    @property
    def capacity(self):
        return self.ring.capacity

    @property
    def origin(self):
        return self.ring.origin

    @property
    def start(self):
        return ring_start(&self.ring)

    @property
    def end(self):
        return self.ring.end

    def append(self, bytes data not None):
        ring_append(&self.ring, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    def replay_position(self, int64_t count):
        return ring_replay_position(&self.ring, count)

    def after_skip(self):
        return ring_after_skip(&self.ring)

    def read(self, int64_t position, int64_t limit):
        return read_ring(&self.ring, position, limit)


cdef class FrameDecoder:
    cdef DecoderData decoder

    def __cinit__(self, *, bint from_viewer):
        decoder_init(&self.decoder, from_viewer)

    def __dealloc__(self):
        decoder_forget(&self.decoder)

    @property
    def buffered(self):
        return decoder_buffered(&self.decoder)

    def feed(self, bytes data not None):
        cdef const char* at = PyBytes_AS_STRING(data)
        cdef size_t size = PyBytes_GET_SIZE(data)
        cdef const char* payload = NULL
        cdef int result
        frames = []
        while True:
            result = decoder_next(&self.decoder, &at, &size, &payload)
            if result != DECODER_FRAME:
                break
            frames.append(Frame(
                FrameType(self.decoder.frame.kind), self.decoder.frame.code, self.decoder.frame.position,
                PyBytes_FromStringAndSize(payload, self.decoder.frame.length),
            ))
        if result == DECODER_NO_MEMORY:
            raise MemoryError
        if result != DECODER_MORE:
            raise ProtocolError("no frame, or after what was none")
        return frames


cdef class ConsoleMux:
    cdef Mux mux
    cdef bint is_made
    cdef bint is_closed
    cdef int owner_pid

    def __cinit__(self, *, int coalesce_ms=COALESCE_MS):
        cdef Mux* mux = &self.mux
        cdef sigset_t every, before
        cdef int failed
        self.is_closed = True
        if not 0 <= coalesce_ms <= 1000:
            raise ValueError("coalesce_ms is within 0..1000")
        pthread_mutex_init(&mux.lock, NULL)
        pthread_mutex_init(&mux.turn, NULL)
        pthread_cond_init(&mux.log_changed, NULL)
        mux.coalesce_ns = <int64_t>coalesce_ms * 1000000
        mux.last_event = &mux.first_event
        mux.epoll = mux.wake_fd = mux.event_fd = -1
        self.is_made = True
        self.owner_pid = getpid()
        mux.scratch = <char*>malloc(SCRATCH_BYTES)
        if mux.scratch == NULL:
            raise MemoryError
        mux.epoll = epoll_create1(EPOLL_CLOEXEC)
        mux.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        mux.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if (
            mux.epoll < 0
            or mux.wake_fd < 0
            or mux.event_fd < 0
            or watch(mux, EPOLL_CTL_ADD, mux.wake_fd, EPOLLIN, 0, ROLE_WAKE) != 0
        ):
            raise OSError(errno, os.strerror(errno))
        # Threads inherit the mask: signals are for Python's.
        sigfillset(&every)
        pthread_sigmask(SIG_SETMASK, &every, &before)
        failed = pthread_create(&mux.thread, NULL, mux_run, mux)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        if failed != 0:
            raise OSError(failed, os.strerror(failed))
        pthread_setname_np(mux.thread, b"console-mux")
        mux.has_thread = True
        self.is_closed = False

    def __dealloc__(self):
        if not self.is_made:
            return
        self.shut()
        if self.mux.epoll >= 0:
            close(self.mux.epoll)
        if self.mux.wake_fd >= 0:
            close(self.mux.wake_fd)
        if self.mux.event_fd >= 0:
            close(self.mux.event_fd)
        free(self.mux.scratch)
        pthread_cond_destroy(&self.mux.log_changed)
        pthread_mutex_destroy(&self.mux.turn)
        pthread_mutex_destroy(&self.mux.lock)

    cdef int shut(self) noexcept:
        """Stop the threads, close what was handed in, free all records. Once; by close() or at the end of the object."""
        cdef Mux* mux = &self.mux
        cdef Console* console
        cdef uint32_t slot
        if self.is_closed:
            return 0
        self.is_closed = True
        if getpid() != self.owner_pid:
            return 0  # a fork: threads and epoll are the parent's
        with nogil:
            mux_lock(mux)
            mux.stopping = True
            pthread_cond_broadcast(&mux.log_changed)
            eventfd_write(mux.wake_fd, 1)
            mux_unlock(mux)
            pthread_join(mux.thread, NULL)
            if mux.has_log_thread:
                pthread_join(mux.log_thread, NULL)
            for slot in range(mux.entry_count):
                if mux.entries[slot].id != 0 and not mux.entries[slot].is_viewer:
                    console = <Console*>mux.entries[slot].record
                    drop_console(mux, console)
                    log_write_out(console, mux.log_buffer)
                    free_console(console)
            free_events(take_events(mux))
            free(mux.entries)
            mux.entries = NULL
            mux.entry_count = 0
            free(mux.log_buffer)
            mux.log_buffer = NULL
            close(mux.epoll)
            close(mux.wake_fd)
            close(mux.event_fd)
            mux.epoll = mux.wake_fd = mux.event_fd = -1
        return 0

    cdef Mux* enter(self) except NULL:
        """Take the lock; the caller gives it back in a ``finally``."""
        cdef Mux* mux = &self.mux
        if self.is_closed:
            raise ValueError("the multiplexer is closed")
        with nogil:
            mux_lock(mux)
        if mux.stopping:
            mux_unlock(mux)
            raise ValueError("the multiplexer is closed")
        return mux

    @property
    def event_fd(self):
        if self.is_closed:
            raise ValueError("the multiplexer is closed")
        return self.mux.event_fd

    def drain_events(self):
        cdef Mux* mux
        cdef EventNode* first
        cdef EventNode* node
        cdef bint lost
        if self.is_closed:
            return []
        mux = self.enter()
        first = node = take_events(mux)
        lost = mux.lost_events
        mux.lost_events = False
        mux_unlock(mux)
        events = []
        try:
            if lost:
                raise MemoryError
            while node != NULL:
                value = ViewerEnd(node.value) if node.kind == 2 else node.value
                events.append(Event(
                    EventKind(node.kind), node.console, node.viewer, value, node.rows, node.columns
                ))
                node = node.next
        finally:
            free_events(first)
        return events

    def create_console(self, *, int64_t scrollback_bytes=SCROLLBACK_BYTES, int64_t position=0, bytes history not None=b""):
        cdef Console* console
        cdef Mux* mux
        cdef uint64_t id = 0
        check_ring(scrollback_bytes, position)
        console = <Console*>calloc(1, sizeof(Console))
        if console == NULL:
            raise MemoryError
        if not ring_init(&console.ring, scrollback_bytes, position):
            free(console)
            raise MemoryError
        ring_append(&console.ring, PyBytes_AS_STRING(history), PyBytes_GET_SIZE(history))
        console.read_fd = console.write_fd = console.log.fd = -1
        console.flushed = console.ring.end
        console.log.position = position
        try:
            mux = self.enter()
            id = id_new(mux, console, False)
            console.id = id
            mux_unlock(mux)
        finally:
            if id == 0:
                free_console(console)
        if id == 0:
            raise MemoryError
        return id

    def remove_console(self, console):
        cdef Mux* mux = self.enter()
        cdef Console* found
        cdef char* buffer = NULL
        try:
            found = find_console(mux, console)
            buffer = <char*>malloc(LOG_BUFFER_BYTES)
            if buffer == NULL:
                raise MemoryError
            with nogil:
                drop_console(mux, found)
        finally:
            mux_unlock(mux)
        with nogil:
            log_write_out(found, buffer)
            free(buffer)
            free_console(found)

    def consoles(self):
        cdef Mux* mux = self.enter()
        cdef uint32_t slot
        try:
            return tuple(sorted([
                mux.entries[slot].id
                for slot in range(mux.entry_count)
                if mux.entries[slot].id != 0 and not mux.entries[slot].is_viewer
            ]))
        finally:
            mux_unlock(mux)

    def changes(self):
        cdef Mux* mux = self.enter()
        cdef Console* console
        changed = []
        try:
            console = mux.changed
            mux.changed = NULL
            while console != NULL:
                console.is_changed = False
                changed.append((console.id, console.ring.end))
                console = console.changed_next
        finally:
            mux_unlock(mux)
        changed.sort()
        return changed

    def attach_guest(self, console, int read_fd, int write_fd=-1):
        cdef Mux* mux = self.enter()
        cdef Console* found
        try:
            found = find_console(mux, console)
            if read_fd < 0:
                raise ValueError("a guest needs a descriptor to read from")
            os.set_blocking(read_fd, False)
            if write_fd >= 0 and write_fd != read_fd:
                os.set_blocking(write_fd, False)
            if watch(mux, EPOLL_CTL_ADD, read_fd, EPOLLIN, found.id, ROLE_GUEST) != 0:
                raise OSError(errno, os.strerror(errno))
            if write_fd >= 0 and write_fd != read_fd:
                if watch(mux, EPOLL_CTL_ADD, write_fd, 0, found.id, ROLE_INPUT) != 0:
                    error = errno
                    unwatch(mux, read_fd)
                    raise OSError(error, os.strerror(error))
            detach_guest(mux, found)
            found.read_fd = read_fd
            found.write_fd = write_fd
            found.read_mask = EPOLLIN
            found.is_terminal = isatty(read_fd)
        finally:
            mux_unlock(mux)

    def detach_guest(self, console):
        cdef Mux* mux = self.enter()
        try:
            detach_guest(mux, find_console(mux, console))
        finally:
            mux_unlock(mux)

    def set_log(self, console, int fd, *, int64_t size=0, int64_t limit_bytes=0, int64_t position=-1):
        cdef Mux* mux
        cdef Console* found
        cdef uint64_t id
        if size < 0 or limit_bytes < 0 or position < -1:
            raise ValueError("sizes and positions are not negative")
        mux = self.enter()
        try:
            found = find_console(mux, console)
            id = found.id
            if fd >= 0:
                os.fstat(fd)
                if not log_start(mux):
                    raise MemoryError("the log's thread could not be started")
            with nogil:
                while found != NULL and found.log.busy:
                    pthread_cond_wait(&mux.log_changed, &mux.lock)
                    found = <Console*>id_find(mux, id, False)
            if found == NULL:
                raise KeyError(console)
            log_close(found)
            found.log.fd = fd
            found.log.bytes = size
            found.log.limit = limit_bytes
            found.log.told_full = False
            if position >= 0:
                found.log.position = min(position, found.ring.end)
            log_enqueue(mux, found)
            return found.log.position
        finally:
            mux_unlock(mux)

    def attach_viewer(
        self,
        console,
        int fd,
        *,
        bint framed=False,
        bint read_only=False,
        bint may_resize=True,
        int64_t replay_bytes=-1,
        int64_t position=-1,
        int64_t credit=-1,
    ):
        cdef Mux* mux
        cdef Console* found
        cdef Viewer* viewer
        cdef int64_t begin, end
        cdef uint64_t id
        if max(replay_bytes, position, credit) >= MOST or min(replay_bytes, position, credit) < -1:
            raise ValueError("replay_bytes, position and credit are within -1..2**62-1")
        mux = self.enter()
        try:
            found = find_console(mux, console)
            check_stream(fd)
            viewer = <Viewer*>calloc(1, sizeof(Viewer))
            if viewer == NULL:
                raise MemoryError
            id = id_new(mux, viewer, True)
            if id == 0:
                free(viewer)
                raise MemoryError
            if watch(mux, EPOLL_CTL_ADD, fd, EPOLLIN, id, ROLE_VIEWER) != 0:
                error = errno
                id_forget(mux, id)
                free(viewer)
                raise OSError(error, os.strerror(error))
            end = found.ring.end
            begin = min(position, end) if position >= 0 else ring_replay_position(&found.ring, replay_bytes)
            viewer.id = id
            viewer.fd = fd
            viewer.mask = EPOLLIN
            viewer.console = found
            viewer.framed = framed
            viewer.read_only = read_only
            viewer.may_resize = may_resize and not read_only
            viewer_init(&viewer.state, &found.ring, framed, begin, credit)
            decoder_init(&viewer.decoder, True)
            viewer.previous = found.last_viewer
            if found.last_viewer != NULL:
                found.last_viewer.next = viewer
            else:
                found.viewers = viewer
            found.last_viewer = viewer
            found.viewer_count += 1
            with nogil:
                pump(mux, viewer)
            return Attached(id, begin, end)
        finally:
            mux_unlock(mux)

    def detach_viewer(self, viewer):
        cdef Mux* mux = self.enter()
        try:
            close_viewer(mux, find_viewer(mux, viewer), QUIET)
        finally:
            mux_unlock(mux)

    def end_viewers(self, console, int reason=0):
        cdef Mux* mux
        cdef Viewer* viewer
        cdef Viewer* following
        if not 0 <= reason <= 0xFFFF:
            raise ValueError("a reason is within 0..65535")
        mux = self.enter()
        try:
            viewer = find_console(mux, console).viewers
            with nogil:
                while viewer != NULL:
                    following = viewer.next
                    viewer_end(&viewer.state, reason)
                    pump(mux, viewer)
                    viewer = following
        finally:
            mux_unlock(mux)

    def write(self, console, bytes data not None):
        cdef Mux* mux = self.enter()
        cdef Console* found
        cdef int64_t accepted
        cdef const char* text = PyBytes_AS_STRING(data)
        cdef size_t size = PyBytes_GET_SIZE(data)
        try:
            found = find_console(mux, console)
            if found.write_fd < 0:
                raise BrokenPipeError("the console has no guest that takes input")
            with nogil:
                accepted = type_in(mux, found, text, size)
            if <size_t>accepted < size:
                found.wants_room = True
            return accepted
        finally:
            mux_unlock(mux)

    def resize(self, console, int rows, int columns):
        cdef Mux* mux
        cdef Console* found
        if not (1 <= rows <= 0xFFFF and 1 <= columns <= 0xFFFF):
            raise ValueError("rows and columns are within 1..65535")
        mux = self.enter()
        try:
            found = find_console(mux, console)
            if not found.is_terminal:
                return False
            if not guest_resize(found, rows, columns):
                raise OSError(errno, os.strerror(errno))
            return True
        finally:
            mux_unlock(mux)

    def read(self, console, int64_t position, int64_t limit):
        cdef Mux* mux
        if position < 0 or not 0 <= limit <= 64 << 20:
            raise ValueError("position and limit are not negative, the limit at most 64 MiB")
        mux = self.enter()
        try:
            return read_ring(&find_console(mux, console).ring, position, limit)
        finally:
            mux_unlock(mux)

    def stats(self, console):
        cdef Mux* mux = self.enter()
        cdef Console* found
        try:
            found = find_console(mux, console)
            return ConsoleStats(
                ring_start(&found.ring), found.ring.end, found.read_fd >= 0, found.viewer_count, found.skipped,
                found.input_bytes, found.input_size, found.log.position, found.log.bytes, found.log.skipped,
            )
        finally:
            mux_unlock(mux)

    def viewer_stats(self, viewer):
        cdef Mux* mux = self.enter()
        cdef Viewer* found
        try:
            found = find_viewer(mux, viewer)
            return ViewerStats(
                found.console.id, found.state.position, found.state.skipped, found.state.sent, found.state.credit,
                sizeof(Viewer) + found.state.out_capacity + decoder_buffered(&found.decoder),
            )
        finally:
            mux_unlock(mux)

    def close(self):
        self.shut()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.shut()


cdef Console* find_console(Mux* mux, object id) except NULL:
    cdef uint64_t key = id if 0 <= id < 1 << 63 else 0
    cdef Console* found = <Console*>id_find(mux, key, False)
    if found == NULL:
        raise KeyError(id)
    return found


cdef Viewer* find_viewer(Mux* mux, object id) except NULL:
    cdef uint64_t key = id if 0 <= id < 1 << 63 else 0
    cdef Viewer* found = <Viewer*>id_find(mux, key, True)
    if found == NULL:
        raise KeyError(id)
    return found


cdef int check_stream(int fd) except -1:
    cdef int kind = 0
    cdef socklen_t size = sizeof(kind)
    if getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) != 0:
        raise OSError(errno, os.strerror(errno))
    if kind != SOCK_STREAM:
        raise ValueError("a viewer is a stream socket")
    if console_mux_has_peer(fd) != 0:
        raise OSError(errno, os.strerror(errno))
    return 0


cdef void drop_console(Mux* mux, Console* console) noexcept nogil:
    """Take a console out of the mux: nothing but its log, its ring and itself are left."""
    id_forget(mux, console.id)
    log_settle(mux, console)
    while console.viewers != NULL:
        close_viewer(mux, console.viewers, QUIET)
    detach_guest(mux, console)
    due_remove(mux, console)
    changed_remove(mux, console)
    forget_events(mux, console.id)


cdef void free_console(Console* console) noexcept nogil:
    log_close(console)
    ring_free(&console.ring)
    free(console)
