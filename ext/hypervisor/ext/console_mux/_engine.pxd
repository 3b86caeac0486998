"""The records of the native multiplexer, its table of ids and its events. Everything is guarded by ``Mux.lock``.

Ids are a serial number and a slot of the table, so that one is never used twice and is found without a search; what
epoll returns is an id and a role, so that news of a descriptor that was closed meanwhile finds nothing.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from hypervisor.ext.console_mux._frames cimport DecoderData
from hypervisor.ext.console_mux._os cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, epoll_ctl, epoll_event, eventfd_read, eventfd_write,
    pthread_cond_t, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t,
)
from hypervisor.ext.console_mux._ring cimport RingData
from hypervisor.ext.console_mux._viewer cimport ViewerState

cdef enum:
    SLOT_BITS = 20
    ROLE_BITS = 2
    EVENT_KINDS = 8

cdef enum Role:
    ROLE_GUEST = 0      # the descriptor that is read; it may be the one to write as well
    ROLE_INPUT = 1      # the descriptor to write, where that is another one
    ROLE_VIEWER = 2
    ROLE_WAKE = 3

cdef enum EventKindC:
    EVENT_GUEST_GONE = 1
    EVENT_VIEWER_GONE = 2
    EVENT_RESIZED = 3
    EVENT_INPUT_READY = 4
    EVENT_INPUT_CLOSED = 5
    EVENT_LOG_FULL = 6
    EVENT_LOG_FAILED = 7

cdef enum ViewerEndC:
    VIEWER_CLOSED = 0
    VIEWER_ENDED = 1
    VIEWER_PROTOCOL_ERROR = 2

cdef struct Entry:
    uint64_t id         # 0: free
    bint is_viewer
    void* record
    uint32_t next_free

cdef struct EventNode:
    int kind
    int rows
    int columns
    uint64_t console
    uint64_t viewer
    int64_t value
    EventNode** owner   # where the record keeps it while it may be told again; NULL when the record is gone
    EventNode* next

cdef struct Viewer:
    uint64_t id
    int fd
    uint32_t mask
    Console* console
    Viewer* previous
    Viewer* next
    EventNode* resized
    bint framed
    bint read_only
    bint may_resize
    bint blocked
    bint paused
    bint deaf
    bint wants_room
    ViewerState state
    DecoderData decoder

cdef struct LogData:
    int fd
    bint busy
    bint told_full
    bint queued
    int64_t position
    int64_t bytes
    int64_t limit
    int64_t skipped
    Console* next

cdef struct Console:
    uint64_t id
    RingData ring
    LogData log
    int read_fd
    int write_fd
    uint32_t read_mask
    uint32_t write_mask
    bint is_terminal
    bint wants_room
    bint is_due
    bint is_changed
    char* input                 # a circle of INPUT_QUEUE_BYTES, there while something is in it
    size_t input_at
    size_t input_size
    int64_t input_bytes
    int64_t skipped
    int64_t flushed
    int64_t flushed_ns
    int64_t due_ns
    Console* due_previous
    Console* due_next
    Console* changed_next
    Viewer* viewers
    Viewer* last_viewer
    uint32_t viewer_count
    EventNode* events[EVENT_KINDS]

cdef struct Mux:
    pthread_mutex_t lock
    pthread_mutex_t turn        # held while waiting for the lock: whoever waits is next
    pthread_cond_t log_changed
    pthread_t thread
    pthread_t log_thread
    bint has_thread
    bint has_log_thread
    bint stopping
    bint lost_events            # there was no memory for one
    int epoll
    int wake_fd
    int event_fd
    int64_t coalesce_ns
    Entry* entries
    uint32_t entry_count
    uint32_t first_free
    uint64_t serial
    EventNode* first_event
    EventNode** last_event
    Console* due_first
    Console* due_last
    Console* changed
    Console* log_first
    Console* log_last
    char* log_buffer
    char* scratch


cdef inline void mux_lock(Mux* mux) noexcept nogil:
    """In turn: without the turnstile a busy thread would take its own lock again and again."""
    pthread_mutex_lock(&mux.turn)
    pthread_mutex_lock(&mux.lock)
    pthread_mutex_unlock(&mux.turn)


cdef inline void mux_unlock(Mux* mux) noexcept nogil:
    pthread_mutex_unlock(&mux.lock)


# Ids


cdef inline uint64_t id_new(Mux* mux, void* record, bint is_viewer) noexcept nogil:
    """Enter a record; 0 without memory."""
    cdef uint32_t slot = mux.first_free
    cdef uint32_t count, i
    cdef void* moved
    if slot == 0:
        count = mux.entry_count * 2 if mux.entry_count > 0 else 64
        if count > (<uint32_t>1 << SLOT_BITS):
            return 0
        moved = realloc(mux.entries, count * sizeof(Entry))
        if moved == NULL:
            return 0
        mux.entries = <Entry*>moved
        memset(mux.entries + mux.entry_count, 0, (count - mux.entry_count) * sizeof(Entry))
        # Slot 0 is never used: it ends the list of free ones.
        for i in range(count - 1, mux.entry_count - 1 if mux.entry_count > 0 else 0, -1):
            mux.entries[i].next_free = mux.first_free
            mux.first_free = i
        mux.entry_count = count
        slot = mux.first_free
    mux.first_free = mux.entries[slot].next_free
    mux.serial += 1
    mux.entries[slot].id = (mux.serial << SLOT_BITS) | slot
    mux.entries[slot].is_viewer = is_viewer
    mux.entries[slot].record = record
    return mux.entries[slot].id


cdef inline void* id_find(const Mux* mux, uint64_t id, bint is_viewer) noexcept nogil:
    cdef uint64_t slot = id & ((<uint64_t>1 << SLOT_BITS) - 1)
    if id == 0 or slot >= mux.entry_count or mux.entries[slot].id != id or mux.entries[slot].is_viewer != is_viewer:
        return NULL
    return mux.entries[slot].record


cdef inline void id_forget(Mux* mux, uint64_t id) noexcept nogil:
    cdef uint32_t slot = <uint32_t>(id & ((<uint64_t>1 << SLOT_BITS) - 1))
    mux.entries[slot].id = 0
    mux.entries[slot].record = NULL
    mux.entries[slot].next_free = mux.first_free
    mux.first_free = slot


# Epoll


cdef inline int watch(Mux* mux, int operation, int fd, uint32_t mask, uint64_t id, int role) noexcept nogil:
    cdef epoll_event event
    event.events = mask
    event.data.u64 = (id << ROLE_BITS) | <uint64_t>role
    return epoll_ctl(mux.epoll, operation, fd, &event)


cdef inline void unwatch(Mux* mux, int fd) noexcept nogil:
    watch(mux, EPOLL_CTL_DEL, fd, 0, 0, 0)


# Events


cdef inline void tell(
    Mux* mux, int kind, uint64_t console, uint64_t viewer, EventNode** owner, int64_t value, int rows, int columns
) noexcept nogil:
    """Keep an event for the owner of the mux; one of the same record that was not drained is changed instead."""
    cdef EventNode* node = owner[0] if owner != NULL else NULL
    if node == NULL:
        node = <EventNode*>calloc(1, sizeof(EventNode))
        if node == NULL:
            mux.lost_events = True
            return
        node.kind = kind
        node.console = console
        node.viewer = viewer
        node.owner = owner
        if owner != NULL:
            owner[0] = node
        if mux.first_event == NULL:
            eventfd_write(mux.event_fd, 1)
        mux.last_event[0] = node
        mux.last_event = &node.next
    node.value = value
    node.rows = rows
    node.columns = columns


cdef inline EventNode* take_events(Mux* mux) noexcept nogil:
    """Return the list of events, which is the caller's to free, and begin another."""
    cdef EventNode* first = mux.first_event
    cdef EventNode* node = first
    cdef uint64_t count
    if first == NULL:
        return NULL
    eventfd_read(mux.event_fd, &count)
    while node != NULL:
        if node.owner != NULL:
            node.owner[0] = NULL
            node.owner = NULL
        node = node.next
    mux.first_event = NULL
    mux.last_event = &mux.first_event
    return first


cdef inline void free_events(EventNode* node) noexcept nogil:
    cdef EventNode* following
    while node != NULL:
        following = node.next
        free(node)
        node = following


cdef inline void forget_events(Mux* mux, uint64_t console) noexcept nogil:
    """Forget what was not drained about a console that is gone."""
    cdef EventNode** link = &mux.first_event
    cdef EventNode* node
    cdef uint64_t count
    if link[0] == NULL:
        return
    while link[0] != NULL:
        node = link[0]
        if node.console == console:
            link[0] = node.next
            free(node)
        else:
            link = &node.next
    mux.last_event = link
    if mux.first_event == NULL:
        eventfd_read(mux.event_fd, &count)


# Lists of consoles


cdef inline void due_remove(Mux* mux, Console* console) noexcept nogil:
    if not console.is_due:
        return
    console.is_due = False
    if console.due_previous != NULL:
        console.due_previous.due_next = console.due_next
    else:
        mux.due_first = console.due_next
    if console.due_next != NULL:
        console.due_next.due_previous = console.due_previous
    else:
        mux.due_last = console.due_previous


cdef inline void due_add(Mux* mux, Console* console, int64_t now_ns) noexcept nogil:
    """At the end: all wait equally long, so that the list is in order of time."""
    if console.is_due:
        return
    console.is_due = True
    console.due_ns = now_ns + mux.coalesce_ns
    console.due_previous = mux.due_last
    console.due_next = NULL
    if mux.due_last != NULL:
        mux.due_last.due_next = console
    else:
        mux.due_first = console
    mux.due_last = console


cdef inline void changed_add(Mux* mux, Console* console) noexcept nogil:
    if not console.is_changed:
        console.is_changed = True
        console.changed_next = mux.changed
        mux.changed = console


cdef inline void changed_remove(Mux* mux, Console* console) noexcept nogil:
    cdef Console** link = &mux.changed
    if not console.is_changed:
        return
    console.is_changed = False
    while link[0] != console:
        link = &link[0].changed_next
    link[0] = console.changed_next
