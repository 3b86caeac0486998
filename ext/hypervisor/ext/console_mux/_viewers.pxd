"""Sending to viewers, and closing them; see _loop_py.py, whose behaviour this has."""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memset

from hypervisor.ext.console_mux._engine cimport (
    EVENT_VIEWER_GONE, ROLE_VIEWER, VIEWER_CLOSED, VIEWER_ENDED, Mux, Viewer, id_forget, tell, unwatch, watch,
)
from hypervisor.ext.console_mux._frames cimport decoder_forget
from hypervisor.ext.console_mux._os cimport (
    EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, MSG_DONTWAIT, MSG_NOSIGNAL, close, iovec, msghdr, recv, sendmsg,
)
from hypervisor.ext.console_mux._viewer cimport (
    PLAN_PIECES, viewer_finished, viewer_free, viewer_plan, viewer_took,
)

cdef enum:
    ROUNDS = 4                  # sends to one viewer in a row before it is another's turn
    SCRATCH_BYTES = 65536
    QUIET = -1                  # close_viewer: the owner did it, and is told nothing


cdef inline void viewer_watch(Mux* mux, Viewer* viewer) noexcept nogil:
    cdef uint32_t wanted = 0
    if viewer.blocked:
        wanted |= EPOLLOUT
    if not viewer.paused and not viewer.deaf:
        wanted |= EPOLLIN
    if wanted != viewer.mask:
        viewer.mask = wanted
        watch(mux, EPOLL_CTL_MOD, viewer.fd, wanted, viewer.id, ROLE_VIEWER)


cdef inline void close_gently(int fd, char* scratch) noexcept nogil:
    """Close a socket. What the peer sent and nobody read would otherwise reset a unix socket's connection, and the peer
    would get an error in place of the end."""
    cdef int i
    for i in range(16):
        if recv(fd, scratch, SCRATCH_BYTES, MSG_DONTWAIT) <= 0:
            break
    close(fd)


cdef inline void close_viewer(Mux* mux, Viewer* viewer, int why) noexcept nogil:
    """Close a viewer's socket and free the viewer."""
    if viewer.previous != NULL:
        viewer.previous.next = viewer.next
    else:
        viewer.console.viewers = viewer.next
    if viewer.next != NULL:
        viewer.next.previous = viewer.previous
    else:
        viewer.console.last_viewer = viewer.previous
    viewer.console.viewer_count -= 1
    unwatch(mux, viewer.fd)
    close_gently(viewer.fd, mux.scratch)
    if viewer.resized != NULL:
        viewer.resized.owner = NULL
    if why != QUIET:
        tell(mux, EVENT_VIEWER_GONE, viewer.console.id, viewer.id, NULL, why, 0, 0)
    id_forget(mux, viewer.id)
    viewer_free(&viewer.state)
    decoder_forget(&viewer.decoder)
    free(viewer)


cdef inline bint pump(Mux* mux, Viewer* viewer) noexcept nogil:
    """Send what the socket takes, for a few rounds; False when the viewer went (and is freed)."""
    cdef iovec pieces[PLAN_PIECES]
    cdef msghdr message
    cdef int count = 0, taken = 1, i
    cdef int64_t total, before
    cdef ssize_t sent
    memset(&message, 0, sizeof(message))
    message.msg_iov = pieces
    for i in range(ROUNDS):
        before = viewer.state.skipped
        total = viewer_plan(&viewer.state, pieces, &count)
        viewer.console.skipped += viewer.state.skipped - before
        if total < 0:
            close_viewer(mux, viewer, VIEWER_CLOSED)
            return False
        if total == 0:
            taken = 1
            break
        message.msg_iovlen = count
        sent = sendmsg(viewer.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent < 0:
            if errno == EAGAIN or errno == EINTR:
                taken = 0
                break
            close_viewer(mux, viewer, VIEWER_CLOSED)
            return False
        taken = viewer_took(&viewer.state, sent)
        if taken < 0:
            close_viewer(mux, viewer, VIEWER_CLOSED)
            return False
        if taken == 0:
            break
        if viewer.state.position == viewer.console.ring.end and viewer.state.ends_at < 0:
            break
    else:
        taken = 0
    if viewer_finished(&viewer.state):
        close_viewer(mux, viewer, VIEWER_ENDED)
        return False
    viewer.blocked = taken == 0
    viewer_watch(mux, viewer)
    return True
