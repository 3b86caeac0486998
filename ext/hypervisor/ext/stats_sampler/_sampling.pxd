"""What a sample does, without Python: read, parse, rates, ring. ``_sampler_py`` specifies it."""

cimport cython
from libc.errno cimport EINTR, ENODEV, errno
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport close, pread

from hypervisor.ext.stats_sampler._parsers cimport MAX_KEYS, Kind, parse_file

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)

cdef enum:
    FILE_BYTES = 65536
    WHOLE = 3072
    STEPS = 16
    HISTORY_MAX = 1 << 20
    LIMIT_SLACK = 1 << 16

    HEADER_COUNT = 4
    COUNTER_COUNT = 26
    RATE_COUNT = 13
    FIELD_COUNT = 39
    VALUE_COUNT = 27
    KIND_MAX = 32
    FILE_MAX = 32

cdef union Field:
    int64_t whole
    double real

cdef struct Stored:
    int64_t sequence
    int64_t monotonic_ns
    int64_t wall_ns
    uint64_t known
    Field fields[FIELD_COUNT]

cdef struct Rate:
    bint based
    bint has_rate
    int64_t at
    int64_t value
    int64_t over
    double rate

cdef struct RateOf:
    int counter
    int over  # -1: the time
    double scale

cdef struct File:
    int fd
    int kind

cdef struct Instance:
    pthread_mutex_t lock
    int64_t serial
    int64_t sequence
    bint gone
    bint was_slow
    int64_t slow_at
    int file_count
    File files[FILE_MAX]
    int64_t values[VALUE_COUNT]
    Rate rates[RATE_COUNT]
    Stored* ring

cdef struct Tables:
    Kind kinds[KIND_MAX]
    RateOf rates[RATE_COUNT]
    int used  # where in an instance's values
    int limit
    int derived
    int inactive

cdef struct Settings:
    const Tables* tables
    int64_t history
    int64_t slow_period
    int64_t min_span


cdef inline Py_ssize_t read_file(int fd, char* buffer) noexcept nogil:
    """Bytes read into a buffer of ``FILE_BYTES + 1``, or -1 with ``errno`` set."""
    cdef Py_ssize_t size = 0, part
    while size <= FILE_BYTES:
        part = pread(fd, buffer + size, FILE_BYTES + 1 - size, size)
        if part < 0:
            if errno == EINTR:
                continue
            return -1
        size += part
        if part == 0 or (size < WHOLE and buffer[size - 1] == 10):
            break
    return size


@cython.cdivision(True)
cdef inline void update_rate(
    Rate* rate, int64_t at, int64_t value, int64_t over, double scale, int64_t min_span
) noexcept nogil:
    if not rate.based or at < rate.at or value < rate.value or over < rate.over:
        rate.has_rate = False
    elif at - rate.at < min_span:
        return
    else:
        rate.has_rate = True
        # Divides by a rise of at least 1.
        rate.rate = 0.0 if over == rate.over else <double> (value - rate.value) * scale / <double> (over - rate.over)
    rate.based = True
    rate.at = at
    rate.value = value
    rate.over = over


@cython.cdivision(True)  # by the length of the ring, at least 1
cdef inline void finish(const Settings* settings, Instance* one, int64_t at, int64_t wall, uint64_t fresh) noexcept nogil:
    """Work out the rates of what was read anew, and put the record into the ring. ``one`` is locked."""
    cdef Stored* record = &one.ring[one.sequence % settings.history]
    cdef uint64_t known = 0
    cdef int64_t value, over
    cdef const RateOf* of
    cdef int i
    for i in range(COUNTER_COUNT):
        value = one.values[i]
        if value >= 0:
            known |= (<uint64_t> 1) << i
        record.fields[i].whole = value
    for i in range(RATE_COUNT):
        of = &settings.tables.rates[i]
        value = one.values[of.counter]
        over = at if of.over < 0 else one.values[of.over]
        if value < 0 or over < 0:
            continue
        if fresh >> of.counter & 1:
            update_rate(&one.rates[i], at, value, over, of.scale, settings.min_span)
        if one.rates[i].has_rate:
            known |= (<uint64_t> 1) << (COUNTER_COUNT + i)
            record.fields[COUNTER_COUNT + i].real = one.rates[i].rate
    one.sequence += 1
    record.sequence = one.sequence
    record.monotonic_ns = at
    record.wall_ns = wall
    record.known = known


cdef inline void reset(Instance* one) noexcept nogil:
    """Close the files and forget what was read from them. ``one`` is locked, or nobody else has it."""
    cdef int i
    for i in range(one.file_count):
        close(one.files[i].fd)
    one.file_count = 0
    one.gone = one.was_slow = False
    for i in range(VALUE_COUNT):
        one.values[i] = -1
    memset(one.rates, 0, sizeof(one.rates))


cdef inline Instance* new_instance(int64_t history) noexcept nogil:
    """An instance without files that nobody else has, for :func:`release` to let go of; NULL without memory."""
    cdef Instance* one = <Instance*> calloc(1, sizeof(Instance))
    if one == NULL:
        return NULL
    one.ring = <Stored*> calloc(history, sizeof(Stored))
    if one.ring == NULL:
        free(one)
        return NULL
    pthread_mutex_init(&one.lock, NULL)
    reset(one)
    return one


cdef inline void release(Instance* one) noexcept nogil:
    """Close and free an instance that nobody else has."""
    if one != NULL:
        reset(one)
        pthread_mutex_destroy(&one.lock)
        free(one.ring)
        free(one)


cdef inline void add_field(const Stored* record, int index, Field* total, uint64_t* known) noexcept nogil:
    """Add one of a record's fields to its total, where it is known."""
    if not record.known >> index & 1:
        return
    known[0] |= (<uint64_t> 1) << index
    if index >= COUNTER_COUNT:
        total.real += record.fields[index].real
    elif record.fields[index].whole > INT64_MAX - total.whole:
        total.whole = INT64_MAX
    else:
        total.whole += record.fields[index].whole


@cython.cdivision(True)  # of numbers that are not negative, by ones that are at least 1
cdef inline bint sample_one(
    const Settings* settings, Instance* one, int64_t at, int64_t wall, bint everything, char* buffer
) noexcept nogil:
    """Read the files of a locked instance and store a record. ``buffer`` has ``FILE_BYTES + 1`` bytes."""
    cdef bint slow = everything or not one.was_slow or at >= one.slow_at
    cdef uint64_t fresh = 0
    cdef int64_t out[MAX_KEYS]
    cdef int64_t value, step, part
    cdef Py_ssize_t size
    cdef const Kind* kind
    cdef const Tables* tables = settings.tables
    cdef int i, j
    if one.file_count == 0:
        return False
    for i in range(one.file_count):
        kind = &tables.kinds[one.files[i].kind]
        if kind.slow and not slow:
            continue
        size = read_file(one.files[i].fd, buffer)
        if size < 0 and errno == ENODEV and kind.vital:
            # Files of a control group that is gone can never be read again.
            reset(one)
            one.gone = True
            return False
        if 0 <= size <= FILE_BYTES:
            parse_file(kind, buffer, size, out)
        else:
            for j in range(kind.count):
                out[j] = -1
        for j in range(kind.count):
            value = out[j]
            if value > INT64_MAX / kind.keys[j].scale:
                value = INT64_MAX
            elif value >= 0:
                value *= kind.keys[j].scale
            one.values[kind.keys[j].value] = value
            fresh |= (<uint64_t> 1) << kind.keys[j].value
    if slow:
        step = settings.slow_period
        if not one.was_slow:
            # (step * part / STEPS, in steps that do not overflow)
            part = one.serial % STEPS + 1
            step = step / STEPS * part + step % STEPS * part / STEPS
        one.slow_at = INT64_MAX if step > INT64_MAX - at else at + step
        one.was_slow = True
    if one.values[tables.used] >= 0 and one.values[tables.inactive] >= 0:
        one.values[tables.derived] = max(0, one.values[tables.used] - one.values[tables.inactive])
    else:
        one.values[tables.derived] = -1
    if one.values[tables.limit] >= INT64_MAX - LIMIT_SLACK:
        one.values[tables.limit] = -1
    finish(settings, one, at, wall, fresh)
    return True
