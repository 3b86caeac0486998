# cython: cdivision=True
"""The thread that writes the consoles' log files; see _log_py.py, whose behaviour this has."""

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport malloc

from hypervisor.ext.console_mux._engine cimport (
    EVENT_LOG_FAILED, EVENT_LOG_FULL, Console, Mux, mux_lock, mux_unlock, tell,
)
from hypervisor.ext.console_mux._frames cimport MAX_DATA_BYTES
from hypervisor.ext.console_mux._os cimport (
    CLOCK_REALTIME, SIG_SETMASK, clock_gettime, close, pthread_cond_broadcast, pthread_cond_timedwait,
    pthread_cond_wait, pthread_create, pthread_mutex_lock, pthread_setname_np, pthread_sigmask, sigfillset, sigset_t,
    timespec, write,
)
from hypervisor.ext.console_mux._ring cimport ring_copy, ring_find, ring_start
from hypervisor.ext.console_mux._viewer cimport MARKER_BYTES, skip_marker

cdef enum:
    LOG_PAUSE_NS = 10000000
    LOG_BUFFER_BYTES = 65536 + 64


cdef inline int64_t log_next_piece(Console* console, char* buffer) noexcept nogil:
    """Move the cursor on and fill ``buffer`` (LOG_BUFFER_BYTES) with what to write; returns how much."""
    cdef int64_t used = 0, size, lost
    cdef int64_t start = ring_start(&console.ring)
    if console.log.position < start:
        lost = start - console.log.position
        console.log.skipped += lost
        used = skip_marker(buffer, lost)
    size = ring_find(&console.ring, &console.log.position, MAX_DATA_BYTES)
    ring_copy(&console.ring, console.log.position, size, buffer + used)
    console.log.position += size
    return used + size


cdef inline int64_t write_all(int fd, const char* data, int64_t size, int* error) noexcept nogil:
    """Return the bytes written; ``error`` is what kept it from the rest, or 0."""
    cdef int64_t done = 0
    cdef ssize_t part
    error[0] = 0
    while done < size:
        part = write(fd, data + done, size - done)
        if part > 0:
            done += part
        elif part == 0 or errno != EINTR:
            error[0] = EIO if part == 0 else errno
            break
    return done


cdef inline void log_close(Console* console) noexcept nogil:
    if console.log.fd >= 0:
        close(console.log.fd)
        console.log.fd = -1


cdef inline void log_write_out(Console* console, char* buffer) noexcept nogil:
    """Write all that is left and close the file; for the end, when the thread has nothing to do with it any more."""
    cdef int64_t size
    cdef int error = 0
    while console.log.fd >= 0 and error == 0:
        size = log_next_piece(console, buffer)
        if size == 0:
            break
        console.log.bytes += write_all(console.log.fd, buffer, size, &error)
    log_close(console)


cdef inline void log_unqueue(Mux* mux, Console* console) noexcept nogil:
    cdef Console* before = NULL
    cdef Console* at = mux.log_first
    if not console.log.queued:
        return
    while at != console:
        before = at
        at = at.log.next
    if before == NULL:
        mux.log_first = console.log.next
    else:
        before.log.next = console.log.next
    if mux.log_last == console:
        mux.log_last = before
    console.log.queued = False


cdef inline void log_enqueue(Mux* mux, Console* console) noexcept nogil:
    if console.log.queued or console.log.fd < 0 or console.log.position >= console.ring.end:
        return
    console.log.queued = True
    console.log.next = NULL
    if mux.log_last == NULL:
        mux.log_first = console
        pthread_cond_broadcast(&mux.log_changed)
    else:
        mux.log_last.log.next = console
    mux.log_last = console


cdef inline void log_write(Mux* mux, Console* console) noexcept nogil:
    """Write one piece, without the lock while the disk works; ``busy`` keeps the console until then."""
    cdef int64_t size, written, again
    cdef int error = 0
    if console.log.fd < 0:
        return
    size = log_next_piece(console, mux.log_buffer)
    if size == 0:
        return
    console.log.busy = True
    mux_unlock(mux)
    written = write_all(console.log.fd, mux.log_buffer, size, &error)
    pthread_mutex_lock(&mux.lock)
    console.log.busy = False
    pthread_cond_broadcast(&mux.log_changed)
    console.log.bytes += written
    if error != 0:
        # What was not written is still in the ring, most likely: the next file begins with it.
        again = console.log.position - (size - written)
        console.log.position = max(again, console.ring.origin)
        log_close(console)
        tell(mux, EVENT_LOG_FAILED, console.id, 0, &console.events[<int>EVENT_LOG_FAILED], error, 0, 0)
        return
    if console.log.limit > 0 and console.log.bytes >= console.log.limit and not console.log.told_full:
        console.log.told_full = True
        tell(mux, EVENT_LOG_FULL, console.id, 0, &console.events[<int>EVENT_LOG_FULL], console.log.bytes, 0, 0)
    log_enqueue(mux, console)


cdef inline void log_pause(Mux* mux) noexcept nogil:
    """Rest a little, so that few large pieces are written; woken early when the mux stops."""
    cdef timespec until
    clock_gettime(CLOCK_REALTIME, &until)
    until.tv_nsec += LOG_PAUSE_NS
    if until.tv_nsec >= 1000000000:
        until.tv_sec += 1
        until.tv_nsec -= 1000000000
    while not mux.stopping and pthread_cond_timedwait(&mux.log_changed, &mux.lock, &until) == 0:
        pass


cdef inline void* log_run(void* argument) noexcept nogil:
    cdef Mux* mux = <Mux*>argument
    cdef Console* console
    cdef Console* last
    cdef bint behind
    mux_lock(mux)
    while not mux.stopping:
        if mux.log_first == NULL:
            pthread_cond_wait(&mux.log_changed, &mux.lock)
            continue
        last = mux.log_last
        behind = False
        while mux.log_first != NULL and not mux.stopping:
            console = mux.log_first
            log_unqueue(mux, console)
            # From here on only ``busy`` guards the console: nothing of it is touched after log_write.
            behind = behind or console.ring.end - console.log.position >= 2 * MAX_DATA_BYTES
            log_write(mux, console)
            if console == last:
                break
        if not behind:
            log_pause(mux)
    mux_unlock(mux)
    return NULL


cdef inline bint log_start(Mux* mux) noexcept nogil:
    """Start the thread, if it is not there; False when that failed. Threads inherit the mask: signals are Python's."""
    cdef sigset_t every, before
    cdef int failed
    if mux.has_log_thread:
        return True
    if mux.log_buffer == NULL:
        mux.log_buffer = <char*>malloc(LOG_BUFFER_BYTES)
        if mux.log_buffer == NULL:
            return False
    sigfillset(&every)
    pthread_sigmask(SIG_SETMASK, &every, &before)
    failed = pthread_create(&mux.log_thread, NULL, log_run, mux)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if failed != 0:
        return False
    pthread_setname_np(mux.log_thread, b"console-log")
    mux.has_log_thread = True
    return True


cdef inline void log_settle(Mux* mux, Console* console) noexcept nogil:
    """Have the thread leave a console's log alone, after the write that may be going on."""
    log_unqueue(mux, console)
    while console.log.busy:
        pthread_cond_wait(&mux.log_changed, &mux.lock)
        log_unqueue(mux, console)
