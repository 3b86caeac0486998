# cython: cdivision=True
# Divisors are the length of a ring, at least 1; what is divided is not negative.
"""The native sampler: ``_sampler_py`` specifies it, ``_sampler_c.pyi`` documents it.

Locks: ``table_lock`` guards which instances there are, an instance's own lock what it holds; the second is only taken
under the first, so whoever takes an instance out of the table and then gets both locks is alone with it. Under a lock
no Python object is touched and the GIL is not waited for; so a thread may wait for a lock with the GIL held, for as
long as one instance's sample takes at most.
"""

from cpython.float cimport PyFloat_FromDouble
from cpython.long cimport PyLong_FromLongLong, PyLong_FromUnsignedLongLong
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from hypervisor.ext.stats_sampler._parsers cimport MAX_KEYS, MAX_NAME, parse_file
from hypervisor.ext.stats_sampler._sampling cimport (
    COUNTER_COUNT, FIELD_COUNT, FILE_BYTES, FILE_MAX, HEADER_COUNT, HISTORY_MAX, KIND_MAX, RATE_COUNT, VALUE_COUNT,
    Field, Instance, Settings, Stored, Tables, add_field, finish, new_instance, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, release, reset, sample_one,
)

from hypervisor.ext.stats_sampler._files import DERIVED, INACTIVE_FILE, KINDS, VALUES, open_files
from hypervisor.ext.stats_sampler._record import COUNTERS, FIELD_INDEX, FIELDS, RATES, UNLIMITED, Record

MAX_FILE_BYTES = FILE_BYTES

# Filled in once, by load_tables; only read afterwards.
cdef Tables tables


cdef int load_tables() except -1:
    """Bring the tables that are shared with the twin into C. Raises ImportError where they do not fit in."""
    fits = (
        len(COUNTERS) == COUNTER_COUNT and len(RATES) == RATE_COUNT and len(FIELDS) == FIELD_COUNT
        and VALUES == VALUE_COUNT and len(KINDS) <= min(KIND_MAX, FILE_MAX) and len(Record._fields) == HEADER_COUNT + FIELD_COUNT
        and all(len(kind.keys) <= MAX_KEYS and all(len(key.name) <= MAX_NAME for key in kind.keys) for kind in KINDS)
    )
    if not fits:
        raise ImportError("the sampler's tables have outgrown its native part")
    cdef int i, j
    cdef bytes name
    for i, kind in enumerate(KINDS):
        tables.kinds[i].format = kind.format
        tables.kinds[i].slow = kind.slow
        tables.kinds[i].vital = kind.vital
        tables.kinds[i].count = len(kind.keys)
        for j, key in enumerate(kind.keys):
            name = key.name
            tables.kinds[i].keys[j].length = len(name)
            for at in range(len(name)):
                tables.kinds[i].keys[j].name[at] = name[at]
            tables.kinds[i].keys[j].value = key.value
            tables.kinds[i].keys[j].scale = key.scale
    for i, rate in enumerate(RATES):
        tables.rates[i].counter = FIELD_INDEX[rate.counter]
        tables.rates[i].over = -1 if rate.over is None else FIELD_INDEX[rate.over]
        tables.rates[i].scale = rate.scale
    tables.used = FIELD_INDEX["memory_used_bytes"]
    tables.limit = FIELD_INDEX["memory_limit_bytes"]
    tables.derived = DERIVED
    tables.inactive = INACTIVE_FILE
    return 0

load_tables()


cdef int64_t checked_time(object value) except -1:
    if not 0 <= value <= UNLIMITED:
        raise ValueError("times are nanoseconds from 0 to 2^63 - 1")
    return value


cdef inline object field_of(const Stored* record, int index):
    """A field of a record, counted with its header; ``index`` is one of Record's."""
    if index == 0:
        return PyLong_FromLongLong(record.sequence)
    if index == 1:
        return PyLong_FromLongLong(record.monotonic_ns)
    if index == 2:
        return PyLong_FromLongLong(record.wall_ns)
    if index == 3:
        return PyLong_FromUnsignedLongLong(record.known)
    index -= HEADER_COUNT
    if not record.known >> index & 1:
        return None
    if index < COUNTER_COUNT:
        return PyLong_FromLongLong(record.fields[index].whole)
    return PyFloat_FromDouble(record.fields[index].real)


cdef int take_files(Instance* one, object sources) except -1:
    """Open the sources' files; they are the instance's. Raises as ``open_files``."""
    cdef list opened = [] if sources is None else open_files(sources)
    # There is room: at most one of each kind is open, and load_tables has seen to it that so many fit.
    for kind, fd in opened:
        one.files[one.file_count].kind = kind
        one.files[one.file_count].fd = fd
        one.file_count += 1
    return 0


cdef object record_of(const Stored* stored):
    cdef tuple fields = PyTuple_New(HEADER_COUNT + FIELD_COUNT)
    cdef object field
    cdef int i
    for i in range(HEADER_COUNT + FIELD_COUNT):
        field = field_of(stored, i)
        Py_INCREF(field)  # the tuple takes this reference over
        PyTuple_SET_ITEM(fields, i, field)
    return tuple.__new__(Record, fields)


def parse(int kind, bytes data not None):
    cdef int64_t out[MAX_KEYS]
    if not 0 <= kind < len(KINDS):
        raise IndexError("there is no such kind of file")
    cdef const char* text = data
    parse_file(&tables.kinds[kind], text, len(data), out)
    return tuple([out[i] if out[i] >= 0 else None for i in range(tables.kinds[kind].count)])


cdef class Sampler:
    cdef Settings settings
    cdef pthread_mutex_t table_lock
    cdef Instance** table
    cdef Py_ssize_t room  # of the table
    cdef Py_ssize_t used  # of the room; what is behind was never used
    cdef int64_t serial
    cdef bint closed
    cdef dict places  # of each slot in the table
    cdef list unused  # places before `used` where there is nothing

    def __cinit__(self, *, history=128, slow_period_ns=5_000_000_000, min_rate_span_ns=50_000_000):
        if not 1 <= history <= HISTORY_MAX:
            raise ValueError(f"history is from 1 to {HISTORY_MAX}")
        if not 0 <= slow_period_ns <= UNLIMITED or not 1 <= min_rate_span_ns <= UNLIMITED:
            raise ValueError("slow_period_ns is from 0, min_rate_span_ns from 1 to 2^63 - 1")
        self.settings.tables = &tables
        self.settings.history = history
        self.settings.slow_period = slow_period_ns
        self.settings.min_span = min_rate_span_ns
        self.places = {}
        self.unused = []
        pthread_mutex_init(&self.table_lock, NULL)

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.used):
            release(self.table[i])
        free(self.table)
        pthread_mutex_destroy(&self.table_lock)

    cdef Instance* lock_at(self, Py_ssize_t place) noexcept nogil:
        """The instance at a place, locked; NULL when there is none."""
        cdef Instance* one = NULL
        pthread_mutex_lock(&self.table_lock)
        if place < self.used:
            one = self.table[place]
            if one != NULL:
                pthread_mutex_lock(&one.lock)
        pthread_mutex_unlock(&self.table_lock)
        return one

    cdef Instance* lock_slot(self, Py_ssize_t place, int64_t slot) noexcept nogil:
        """The instance of a slot, locked; NULL when another thread has just removed it."""
        cdef Instance* one = self.lock_at(place)
        if one != NULL and one.serial != slot:
            pthread_mutex_unlock(&one.lock)
            return NULL
        return one

    cdef Instance* locked(self, object slot) except NULL:
        """The instance of a slot, locked. Raises KeyError."""
        cdef Instance* one = self.lock_slot(self.places[slot], slot)
        if one == NULL:
            raise KeyError(slot)
        return one

    cdef int enter(self, Instance* one) except -1:
        """Put an instance into the table, which owns it from then on."""
        cdef Py_ssize_t place, room
        cdef Instance** table
        place = self.unused.pop() if self.unused else self.used
        if place == self.room:
            room = max(64, 2 * self.room)
            pthread_mutex_lock(&self.table_lock)
            table = <Instance**> realloc(self.table, room * sizeof(Instance*))
            if table != NULL:
                self.table = table
                self.room = room
            pthread_mutex_unlock(&self.table_lock)
            if table == NULL:
                raise MemoryError
        self.places[one.serial] = place
        pthread_mutex_lock(&self.table_lock)
        self.table[place] = one
        self.used = max(self.used, place + 1)
        pthread_mutex_unlock(&self.table_lock)
        return 0

    def add(self, sources=None):
        cdef Instance* one = new_instance(self.settings.history)
        cdef int64_t serial
        if one == NULL:
            raise MemoryError
        try:
            take_files(one, sources)
            # Only now: opening lets other threads run.
            if self.closed:
                raise ValueError("the sampler is closed")
            self.serial += 1
            serial = one.serial = self.serial
            self.enter(one)
        except BaseException:
            release(one)
            raise
        return serial

    def reopen(self, slot, sources=None):
        cdef Instance* one
        # Holds the new files until they are the slot's, so that nothing is lost when opening fails.
        cdef Instance* holder = new_instance(1)
        if holder == NULL:
            raise MemoryError
        try:
            if slot not in self.places:
                raise KeyError(slot)
            take_files(holder, sources)
            one = self.locked(slot)
            reset(one)
            one.file_count = holder.file_count
            one.files = holder.files
            pthread_mutex_unlock(&one.lock)
            holder.file_count = 0
        finally:
            release(holder)

    def remove(self, slot):
        cdef Py_ssize_t place = self.places.pop(slot)
        cdef Instance* one
        pthread_mutex_lock(&self.table_lock)
        one = self.table[place]
        self.table[place] = NULL
        # Whoever had taken it from the table before is waited for; now nobody can.
        pthread_mutex_lock(&one.lock)
        pthread_mutex_unlock(&one.lock)
        pthread_mutex_unlock(&self.table_lock)
        with nogil:
            release(one)
        self.unused.append(place)

    def close(self):
        self.closed = True
        for slot in list(self.places):
            try:
                self.remove(slot)
            except KeyError:
                continue  # another thread was quicker

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __len__(self):
        return len(self.places)

    def slots(self):
        return sorted(self.places)

    def gone(self):
        return [slot for slot in self.slots() if self.state(slot) < 0]

    def open_files(self):
        return sum([max(0, self.state(slot)) for slot in self.slots()])

    cdef int state(self, object slot):
        """How many files a slot has open; -1 when its group is gone."""
        cdef Instance* one
        cdef int count
        place = self.places.get(slot)
        one = NULL if place is None else self.lock_slot(place, slot)
        if one == NULL:
            return 0
        count = -1 if one.gone else one.file_count
        pthread_mutex_unlock(&one.lock)
        return count

    def sample(self, slot, now_monotonic_ns, now_wall_ns, *, bint everything=False):
        cdef char buffer[FILE_BYTES + 1]
        cdef int64_t at = checked_time(now_monotonic_ns), wall = checked_time(now_wall_ns), serial
        cdef Py_ssize_t place = self.places[slot]
        cdef bint stored = False
        cdef Instance* one
        serial = slot
        with nogil:
            one = self.lock_slot(place, serial)
            if one != NULL:
                stored = sample_one(&self.settings, one, at, wall, everything, buffer)
                pthread_mutex_unlock(&one.lock)
        if one == NULL:
            raise KeyError(slot)
        return stored

    def sample_all(self, now_monotonic_ns, now_wall_ns):
        cdef char buffer[FILE_BYTES + 1]
        cdef int64_t at = checked_time(now_monotonic_ns), wall = checked_time(now_wall_ns)
        cdef Py_ssize_t place = 0, count = 0, used = self.used
        cdef Instance* one
        with nogil:
            for place in range(used):
                one = self.lock_at(place)
                if one != NULL:
                    count += sample_one(&self.settings, one, at, wall, False, buffer)
                    pthread_mutex_unlock(&one.lock)
        return count

    def sample_some(self, slots, now_monotonic_ns, now_wall_ns, *, bint everything=False):
        cdef char buffer[FILE_BYTES + 1]
        cdef int64_t at = checked_time(now_monotonic_ns), wall = checked_time(now_wall_ns)
        cdef list found = [(slot, self.places[slot]) for slot in slots if slot in self.places]
        cdef Py_ssize_t length = len(found), i, count = 0
        cdef int64_t* serials = <int64_t*> malloc((2 * length + 1) * sizeof(int64_t))
        cdef Instance* one
        if serials == NULL:
            raise MemoryError
        try:
            for i in range(length):
                serials[2 * i], serials[2 * i + 1] = found[i]
            with nogil:
                for i in range(length):
                    one = self.lock_slot(serials[2 * i + 1], serials[2 * i])
                    if one != NULL:
                        count += sample_one(&self.settings, one, at, wall, everything, buffer)
                        pthread_mutex_unlock(&one.lock)
            return count
        finally:
            free(serials)

    def store(self, slot, now_monotonic_ns, now_wall_ns, values):
        cdef int64_t at = checked_time(now_monotonic_ns), wall = checked_time(now_wall_ns)
        cdef int64_t given[VALUE_COUNT]
        cdef Instance* one
        cdef bint refused
        cdef int i
        if slot not in self.places:
            raise KeyError(slot)
        for i in range(VALUE_COUNT):
            given[i] = -1
        for name, value in values.items():
            if name not in COUNTERS:
                raise ValueError(f"{name} is not a field that can be handed in")
            if not 0 <= value <= UNLIMITED:
                raise ValueError(f"{name} must be from 0 to 2^63 - 1")
            i = FIELD_INDEX[name]
            given[i] = value
        one = self.locked(slot)
        refused = one.file_count > 0
        if not refused:
            one.values = given
            finish(&self.settings, one, at, wall, ~(<uint64_t> 0))
        pthread_mutex_unlock(&one.lock)
        if refused:
            raise ValueError(f"slot {slot} has files of its own")

    def latest(self, slot):
        cdef Instance* one = self.locked(slot)
        cdef Stored record
        cdef bint any_yet = one.sequence > 0
        if any_yet:
            record = one.ring[(one.sequence - 1) % self.settings.history]
        pthread_mutex_unlock(&one.lock)
        return record_of(&record) if any_yet else None

    def history(self, slot, *, after_sequence=0, since_monotonic_ns=0, limit=None):
        cdef int64_t length = self.settings.history, after, since, most, first, at, count = 0
        cdef Instance* one
        cdef Stored* copy
        cdef Stored* record
        after = max(0, min(after_sequence, UNLIMITED))
        since = max(0, min(since_monotonic_ns, UNLIMITED))
        most = length if limit is None else max(0, min(limit, length))
        copy = <Stored*> malloc(length * sizeof(Stored))
        if copy == NULL:
            raise MemoryError
        try:
            one = self.locked(slot)
            first = max(0, one.sequence - length)
            # From the newest backwards, so that the newest are had; times may be in any order.
            for at in range(one.sequence - 1, first - 1, -1):
                record = &one.ring[at % length]
                if count == most or record.sequence <= after:
                    break
                if record.monotonic_ns >= since:
                    copy[count] = record[0]
                    count += 1
            pthread_mutex_unlock(&one.lock)
            return [record_of(&copy[at]) for at in range(count - 1, -1, -1)]
        finally:
            free(copy)

    def select(self, fields):
        cdef list indexes = []
        cdef list rows = []
        cdef tuple row
        cdef Instance* one
        cdef Stored record
        cdef Py_ssize_t place, width
        cdef int64_t serial
        cdef bint any_yet
        for name in fields:
            if name not in Record._fields:
                raise ValueError(f"a record has no field {name}")
            indexes.append(Record._fields.index(name))
        width = len(indexes)
        for place in range(self.used):
            one = self.lock_at(place)
            if one == NULL:
                continue
            serial = one.serial
            any_yet = one.sequence > 0
            if any_yet:
                record = one.ring[(one.sequence - 1) % self.settings.history]
            pthread_mutex_unlock(&one.lock)
            if any_yet:
                rows.append((serial, *[field_of(&record, index) for index in indexes]))
        rows.sort()
        return rows

    def totals(self, fields):
        cdef int indexes[FIELD_COUNT]
        cdef Field sums[FIELD_COUNT]
        cdef uint64_t known = 0
        cdef Instance* one
        cdef Stored* record
        cdef Py_ssize_t place
        cdef int width = 0, i
        cdef list names = list(dict.fromkeys(fields))
        for name in names:
            if name not in FIELD_INDEX:
                raise ValueError(f"there is no field {name} to add up")
            indexes[width] = FIELD_INDEX[name]
            width += 1
        memset(sums, 0, sizeof(sums))
        for place in range(self.used):
            one = self.lock_at(place)
            if one == NULL:
                continue
            if not one.gone and one.sequence > 0:
                record = &one.ring[(one.sequence - 1) % self.settings.history]
                for i in range(width):
                    add_field(record, indexes[i], &sums[i], &known)
            pthread_mutex_unlock(&one.lock)
        found = {}
        for i, name in enumerate(names):
            if not known >> indexes[i] & 1:
                found[name] = None
            elif indexes[i] < COUNTER_COUNT:
                found[name] = sums[i].whole
            else:
                found[name] = sums[i].real
        return tuple([found[name] for name in fields])
