"""Native twin of _table_py: the same names, the same behaviour, over C columns; long calls run without the GIL."""

cimport cython
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from hypervisor.ext.scoring._arguments cimport (
    MAX_AMOUNT, MAX_DOMAINS, MAX_NODES, PyLong_AsLongLong, unsigned, within,
)
from hypervisor.ext.scoring._choice cimport (
    OUT_OF_RANGE, Found, add_to_counts, choose, place_one, take, take_back,
)
from hypervisor.ext.scoring._engine cimport (
    BLOCK, HOT_SHAPES, KIND_CLASS, KIND_COUNTER, KIND_FREE, KIND_GROUP, KIND_PREFERENCE, MAX_ENTRIES, MAX_GROUPS,
    Counter, Entry, Table, Wanted,
    clear_entry, count_of, drop_entry, entry_of, hv_begun, hv_block, hv_choose_kernels, new_entry, reach, set_count,
    set_domain, set_shares, touch,
)
from hypervisor.ext.scoring._many cimport Candidate, choose_many, fill, rank
from hypervisor.ext.scoring._request_c cimport Request

from hypervisor.ext.scoring import _rules
from hypervisor.ext.scoring._explain import explain

cdef enum:
    LARGE = 256 * 64  # slots from which on a single choice is worth giving up the GIL for


@cython.final
cdef class NodeTable:
    """See :class:`._table_py.NodeTable`."""

    cdef Table table
    cdef bint busy  # a thread works on the table without the GIL
    cdef readonly str vectors

    def __cinit__(self, *, bint plain=False):
        cdef const char* vectors = NULL
        self.table.kernels = hv_choose_kernels(plain, &vectors)
        self.vectors = vectors.decode()

    def __dealloc__(self):
        cdef Table* t = &self.table
        cdef int i
        for i in range(t.entries_used):
            clear_entry(&t.entries[i])
        for i in range(HOT_SHAPES + 1):
            free(t.hot[i].scores)
            free(t.hot[i].peaks)
            free(t.hot[i].tie_keys)
            free(t.hot[i].tie_stale)
        free(t.entries)
        free(t.blocks)
        free(t.summaries)
        free(t.hashes)
        free(t.cpu_total)
        free(t.memory_total)
        free(t.disk_total)
        free(t.load)
        free(t.alive)
        free(t.freed)
        free(t.domain_values)

    cdef int enter(self) except -1:
        if self.busy:
            raise RuntimeError("another thread works on this table")
        return 0

    cdef int64_t known(self, object slot) except -1:
        """The slot, checked to have a node."""
        cdef int64_t number
        self.enter()
        if not isinstance(slot, int):
            raise TypeError(f"slot must be an integer, not {type(slot).__name__}")
        try:
            number = PyLong_AsLongLong(slot)
        except OverflowError:
            raise KeyError(slot) from None
        if not 0 <= number < self.table.high or not self.table.alive[number]:
            raise KeyError(slot)
        return number

    cdef Entry* entry(self, object id, int32_t kind) except NULL:
        cdef Entry* found = NULL
        self.enter()
        if not isinstance(id, int):
            raise TypeError(f"id must be an integer, not {type(id).__name__}")
        try:
            found = entry_of(&self.table, PyLong_AsLongLong(id), kind)
        except OverflowError:
            pass
        if found == NULL:
            raise KeyError(id)
        return found

    cdef int64_t make(self, int32_t kind, object group) except 0:
        cdef int64_t id
        cdef Entry* of = self.entry(group, KIND_GROUP) if kind == KIND_COUNTER else NULL
        self.enter()
        if self.table.entries_live == MAX_ENTRIES - 1:
            raise OverflowError("at most 65535 classes, preferences, groups and counters")
        if kind == KIND_GROUP and self.table.groups_live == MAX_GROUPS:
            raise OverflowError("at most 64 groups")
        id = new_entry(&self.table, kind, of.group if of != NULL else NULL)
        if id == 0:
            raise MemoryError
        return id

    cdef int check_ids(self, const Wanted* w) except -1:
        """All that a request names is there: what _choice relies on."""
        cdef int32_t i
        self.enter()
        for i in range(w.shape.classes):
            if entry_of(&self.table, w.shape.class_ids[i], KIND_CLASS) == NULL:
                raise KeyError(w.shape.class_ids[i])
        for i in range(w.shape.preferences):
            if entry_of(&self.table, w.shape.preference_ids[i], KIND_PREFERENCE) == NULL:
                raise KeyError(w.shape.preference_ids[i])
        for i in range(w.shape.hards):
            if entry_of(&self.table, w.shape.hard_ids[i], KIND_COUNTER) == NULL:
                raise KeyError(w.shape.hard_ids[i])
        for i in range(w.adds):
            if entry_of(&self.table, w.add_ids[i], KIND_COUNTER) == NULL:
                raise KeyError(w.add_ids[i])
        for i in range(w.shape.softs):
            if entry_of(&self.table, w.shape.soft_ids[i], KIND_COUNTER) == NULL:
                raise KeyError(w.shape.soft_ids[i])
        return 0

    # Nodes

    def __len__(self):
        return self.table.live

    def slots(self):
        cdef int64_t i
        self.enter()
        return [i for i in range(self.table.high) if self.table.alive[i]]

    def add_node(self, node_hash):
        cdef Table* t = &self.table
        cdef uint64_t value = unsigned("node_hash", node_hash)
        cdef int64_t slot
        cdef hv_block* block
        self.enter()
        if t.live == MAX_NODES:
            raise OverflowError(f"at most {MAX_NODES} nodes")
        if t.freed_count:
            t.freed_count -= 1
            slot = t.freed[t.freed_count]
        else:
            if not reach(t, t.high + 1):
                raise MemoryError
            slot = t.high
            t.high += 1
        t.live += 1
        t.alive[slot] = 1
        t.hashes[slot] = value
        block = &t.blocks[slot // BLOCK]
        block.tie_hash[slot % BLOCK] = hv_begun(value)
        self.write(slot, 0, 0, 0, 0, 0, 0, 0, -1, 0)
        return slot

    def remove_node(self, slot):
        cdef Table* t = &self.table
        cdef int64_t at = self.known(slot)
        cdef Entry* entry
        cdef int32_t i
        for i in range(t.entries_used):
            entry = &t.entries[i]
            if entry.kind == KIND_CLASS:
                (<uint64_t*> entry.column)[at // BLOCK] &= ~(<uint64_t> 1 << (at % BLOCK))
            elif entry.kind == KIND_PREFERENCE:
                (<int32_t*> entry.column)[at] = 0
            elif entry.kind == KIND_GROUP:
                set_domain(t, entry.group, at, -1)
        self.write(at, 0, -1, 0, 0, 0, 0, 0, -1, 0)
        t.alive[at] = 0
        t.freed[t.freed_count] = <int32_t> at
        t.freed_count += 1
        t.live -= 1

    cdef void write(
        self, int64_t slot, int64_t cpu_total, int64_t cpu_free, int64_t memory_total, int64_t memory_free,
        int64_t disk_total, int64_t disk_free, int64_t bits, int64_t load, int64_t penalty,
    ) noexcept:
        cdef Table* t = &self.table
        cdef hv_block* block = &t.blocks[slot // BLOCK]
        cdef int64_t at = slot % BLOCK
        t.cpu_total[slot] = <int32_t> cpu_total
        t.memory_total[slot] = <int32_t> memory_total
        t.disk_total[slot] = <int32_t> disk_total
        t.load[slot] = <int16_t> load
        block.cpu_free[at] = <int32_t> cpu_free
        block.memory_free[at] = <int32_t> memory_free
        block.disk_free[at] = <int32_t> disk_free
        block.bits[at] = <int32_t> bits
        block.load_score[at] = <int32_t> (500 if load < 0 else 1000 - load)
        block.penalty_score[at] = <int32_t> (1000 - penalty)
        set_shares(t, slot)
        touch(t, slot)

    def set_node(
        self, slot, cpu_total, cpu_free, memory_total, memory_free, disk_total, disk_free, bits, load, penalty
    ):
        cdef int64_t at = self.known(slot)
        cdef int64_t cpus = within("cpu_total", cpu_total, 0, MAX_AMOUNT)
        cdef int64_t cpus_free = within("cpu_free", cpu_free, -MAX_AMOUNT, cpus)
        cdef int64_t memories = within("memory_total", memory_total, 0, MAX_AMOUNT)
        cdef int64_t memories_free = within("memory_free", memory_free, -MAX_AMOUNT, memories)
        cdef int64_t disks = within("disk_total", disk_total, 0, MAX_AMOUNT)
        cdef int64_t disks_free = within("disk_free", disk_free, -MAX_AMOUNT, disks)
        self.write(
            at, cpus, cpus_free, memories, memories_free, disks, disks_free, within("bits", bits, 0, 0x7FFFFFFF),
            within("load", load, -1, 1000), within("penalty", penalty, 0, 1000),
        )

    cdef int take_checked(self, int64_t slot, int64_t cpu, int64_t memory, int64_t disk) except -1:
        """Lower what is free by amounts of at most 2 * MAX_AMOUNT, where it stays in range."""
        cdef Table* t = &self.table
        cdef hv_block* block = &t.blocks[slot // BLOCK]
        cdef int64_t at = slot % BLOCK
        within("cpu_free", block.cpu_free[at] - cpu, -MAX_AMOUNT, t.cpu_total[slot])
        within("memory_free", block.memory_free[at] - memory, -MAX_AMOUNT, t.memory_total[slot])
        within("disk_free", block.disk_free[at] - disk, -MAX_AMOUNT, t.disk_total[slot])
        take(t, slot, cpu, memory, disk)
        return 0

    def adjust(self, slot, cpu, memory, disk):
        cdef int64_t at = self.known(slot), most = 2 * <int64_t> MAX_AMOUNT
        self.take_checked(
            at, -within("cpu", cpu, -most, most), -within("memory", memory, -most, most), -within("disk", disk, -most, most)
        )

    def node(self, slot):
        cdef int64_t at = self.known(slot)
        cdef Table* t = &self.table
        cdef hv_block* block = &t.blocks[at // BLOCK]
        cdef int64_t lane = at % BLOCK
        return _rules.NodeRow(
            t.hashes[at], t.cpu_total[at], block.cpu_free[lane], t.memory_total[at], block.memory_free[lane],
            t.disk_total[at], block.disk_free[lane], block.bits[lane], t.load[at], 1000 - block.penalty_score[lane],
        )

    # Classes and preferences

    def add_class(self):
        return self.make(KIND_CLASS, None)

    def drop_class(self, class_id):
        drop_entry(&self.table, self.entry(class_id, KIND_CLASS))

    def set_class(self, class_id, slot, bint value):
        cdef uint64_t* words = <uint64_t*> self.entry(class_id, KIND_CLASS).column
        cdef int64_t at = self.known(slot)
        cdef uint64_t bit = <uint64_t> 1 << (at % BLOCK)
        if value:
            words[at // BLOCK] |= bit
        else:
            words[at // BLOCK] &= ~bit
        touch(&self.table, at)

    def class_value(self, class_id, slot):
        cdef int64_t at = self.known(slot)
        cdef uint64_t* words = <uint64_t*> self.entry(class_id, KIND_CLASS).column
        return bool((words[at // BLOCK] >> (at % BLOCK)) & 1)

    def classes(self):
        cdef int32_t i
        self.enter()
        return sorted([
            self.table.entries[i].id for i in range(self.table.entries_used) if self.table.entries[i].kind == KIND_CLASS
        ])

    def add_preference(self):
        return self.make(KIND_PREFERENCE, None)

    def drop_preference(self, preference):
        drop_entry(&self.table, self.entry(preference, KIND_PREFERENCE))

    def set_preference(self, preference, slot, value):
        cdef int32_t* values = <int32_t*> self.entry(preference, KIND_PREFERENCE).column
        cdef int64_t at = self.known(slot)
        values[at] = <int32_t> within("value", value, 0, 1000)
        touch(&self.table, at)

    def preference_value(self, preference, slot):
        cdef int64_t at = self.known(slot)
        return (<int32_t*> self.entry(preference, KIND_PREFERENCE).column)[at]

    # Groups of domains, and counters

    def add_group(self):
        return self.make(KIND_GROUP, None)

    def drop_group(self, group):
        drop_entry(&self.table, self.entry(group, KIND_GROUP))

    def set_domain(self, group, slot, domain):
        cdef Entry* entry = self.entry(group, KIND_GROUP)
        cdef int64_t at = self.known(slot)
        if not set_domain(&self.table, entry.group, at, within("domain", domain, -1, MAX_DOMAINS - 1)):
            raise MemoryError

    def domain(self, group, slot):
        cdef int64_t at = self.known(slot)
        return self.entry(group, KIND_GROUP).group.domain[at] - 1

    def add_counter(self, group):
        return self.make(KIND_COUNTER, group)

    def drop_counter(self, counter):
        drop_entry(&self.table, self.entry(counter, KIND_COUNTER))

    def add_count(self, counter, domain, delta):
        cdef Counter* counts = self.entry(counter, KIND_COUNTER).counter
        cdef int64_t at = within("domain", domain, 0, MAX_DOMAINS - 1)
        cdef int64_t count = within("count", count_of(counts, at) + delta, 0, MAX_AMOUNT)
        if not set_count(&self.table, counts, at, <int32_t> count):
            raise MemoryError

    def count(self, counter, domain):
        cdef Counter* counts = self.entry(counter, KIND_COUNTER).counter
        return count_of(counts, domain) if 0 <= domain < MAX_DOMAINS else 0

    def count_near(self, counter, slot):
        cdef Counter* counts = self.entry(counter, KIND_COUNTER).counter
        cdef int64_t domain = counts.group.domain[self.known(slot)] - 1
        return None if domain < 0 else count_of(counts, domain)

    # Choosing

    def explain(self, Request request not None, slot):
        return explain(self, request, slot)

    def pick(self, Request request not None, seed=0):
        cdef uint64_t number = unsigned("seed", seed)
        cdef Found found
        cdef int done
        self.check_ids(&request.wanted)
        if self.table.high > LARGE:
            self.busy = True
            with nogil:
                done = choose(&self.table, &request.wanted, number, &found)
            self.busy = False
        else:
            done = choose(&self.table, &request.wanted, number, &found)
        if not done:
            raise MemoryError
        return (found.slot, found.score) if found.slot >= 0 else None

    def place(self, Request request not None, seed=0):
        cdef uint64_t number = unsigned("seed", seed)
        cdef Found found
        cdef int done
        self.check_ids(&request.wanted)
        if self.table.high > LARGE:
            self.busy = True
            with nogil:
                done = place_one(&self.table, &request.wanted, number, &found)
            self.busy = False
        else:
            done = place_one(&self.table, &request.wanted, number, &found)
        if done != 1:
            raise not_placed(done)
        return (found.slot, found.score) if found.slot >= 0 else None

    def unplace(self, Request request not None, slot):
        cdef int64_t at
        cdef Wanted* w = &request.wanted
        self.check_ids(w)
        at = self.known(slot)
        if w.adds and add_to_counts(&self.table, w, at, -1) != 1:  # no count grows: memory is no question
            raise ValueError(f"count must be 0..{MAX_AMOUNT}, not -1")
        try:
            self.take_checked(at, -w.shape.cpu, -w.shape.memory, -w.shape.disk)
        except ValueError:
            add_to_counts(&self.table, w, at, 1)
            raise

    def top(self, Request request not None, count, seed=0):
        cdef uint64_t number = unsigned("seed", seed)
        cdef int64_t most = within("count", count, 0, <int64_t> 1 << 62), slot, passed = 0
        cdef Table* t = &self.table
        cdef int done
        cdef Candidate* found
        self.check_ids(&request.wanted)
        found = <Candidate*> malloc((t.high + 1) * sizeof(Candidate))
        if found == NULL:
            raise MemoryError
        self.busy = True
        with nogil:
            done = rank(t, &request.wanted, number, found, &passed)
        self.busy = False
        try:
            if not done:
                raise MemoryError
            return [(found[slot].slot, found[slot].score) for slot in range(min(most, passed))]
        finally:
            free(found)

    def pick_many(self, requests, seeds):
        return self.many(requests, seeds, False)

    def place_many(self, requests, seeds):
        return self.many(requests, seeds, True)

    cdef list many(self, object requests, object seeds, bint reserve):
        cdef tuple wanted = tuple(requests), numbers = tuple(seeds)
        cdef int64_t count = len(wanted), i = 0
        cdef int done
        cdef const Wanted** pointers
        cdef uint64_t* values
        cdef Found* found
        if len(numbers) != count:
            raise ValueError(f"{count} requests, {len(numbers)} seeds")
        pointers = <const Wanted**> malloc((count + 1) * sizeof(void*))
        values = <uint64_t*> malloc((count + 1) * sizeof(uint64_t))
        found = <Found*> malloc((count + 1) * sizeof(Found))
        try:
            if pointers == NULL or values == NULL or found == NULL:
                raise MemoryError
            for i in range(count):
                pointers[i] = &(<Request?> wanted[i]).wanted
                values[i] = unsigned("seed", numbers[i])
                self.check_ids(pointers[i])
            self.enter()
            self.busy = True
            with nogil:
                done = choose_many(&self.table, pointers, values, count, reserve, found)
            self.busy = False
            if done != 1:
                raise not_placed(done)
            return [(found[i].slot, found[i].score) if found[i].slot >= 0 else None for i in range(count)]
        finally:
            free(pointers)
            free(values)
            free(found)

    def place_batch(self, Request request not None, count, seed=0):
        cdef uint64_t number = unsigned("seed", seed)
        cdef int64_t most = within("count", count, 0, <int64_t> 1 << 62), placed = 0
        cdef Found found
        cdef int done = 1
        cdef list result = []
        self.check_ids(&request.wanted)
        while placed < most:
            done = place_one(&self.table, &request.wanted, number, &found)
            if done != 1 or found.slot < 0:
                break
            result.append((found.slot, found.score))
            placed += 1
        if done != 1:
            for slot, _ in result:
                take_back(&self.table, &request.wanted, slot)
            raise not_placed(done)
        return result

    def capacity(self, Request request not None, limit):
        cdef int64_t left = within("limit", limit, 0, <int64_t> 1 << 62), slot
        cdef Table* t = &self.table
        cdef Wanted* w = &request.wanted
        cdef int done
        cdef int64_t* numbers
        self.check_ids(w)
        numbers = <int64_t*> calloc(t.high + 1, sizeof(int64_t))
        if numbers == NULL:
            raise MemoryError
        self.busy = True
        with nogil:
            done = fill(t, w, left, numbers)
        self.busy = False
        try:
            if done != 1:
                raise not_placed(done)
            return [(slot, numbers[slot]) for slot in range(t.high) if numbers[slot]]
        finally:
            free(numbers)


cdef object not_placed(int done):
    """The error for what :func:`place_one` returned."""
    if done == OUT_OF_RANGE:
        return ValueError(f"count must be 0..{MAX_AMOUNT}, not {MAX_AMOUNT + 1}")
    return MemoryError()
