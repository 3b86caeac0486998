"""The native table's memory and its upkeep: columns, ids, groups, and what has changed since somebody looked.

All of it is inline C over one ``Table``; nothing here touches Python. Slots, domains and ids that arrive here were
checked by :mod:`._table_c`. Columns end at ``capacity``, a multiple of BLOCK; slots below ``high`` have been in use.
"""

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign


cdef extern from "hypervisor/ext/scoring/_kernels.h" nogil:
    enum: BLOCK
    enum: FAILS
    enum: MAX_COLUMNS

    ctypedef struct hv_block:
        int32_t* cpu_free
        int32_t* memory_free
        int32_t* disk_free
        int32_t* bits
        uint32_t* base
        uint32_t* cpu_rate
        uint32_t* memory_rate
        uint32_t* tie_hash
        int32_t* load_score
        int32_t* penalty_score

    ctypedef struct hv_summary:
        int32_t cpu_free
        int32_t memory_free
        int32_t disk_free
        int32_t bits
        int32_t cpu_free_min
        int32_t memory_free_min
        int32_t disk_free_min
        int32_t bits_of_all
        uint32_t base_max
        uint32_t base_min
        uint32_t cpu_rate_max
        uint32_t cpu_rate_min
        uint32_t memory_rate_max
        uint32_t memory_rate_min
        int32_t load_max
        int32_t penalty_max
        int32_t stale

    ctypedef struct hv_plan:
        int32_t cpu
        int32_t memory
        int32_t disk
        int32_t bits
        int32_t constant
        int32_t share_weight
        int32_t load_weight
        int32_t penalty_weight
        int32_t classes
        int32_t columns
        int32_t groups
        const uint64_t** class_words
        const int32_t** column
        int32_t* column_weight
        const int32_t** domain
        const int32_t** domain_value

    ctypedef struct hv_kernels:
        int32_t (*judge)(const hv_block*, const hv_summary*, const hv_plan*, size_t, int32_t*) noexcept nogil
        int32_t (*tie)(const hv_block*, const int32_t*, int32_t, uint32_t) noexcept nogil
        int32_t (*peak)(const int32_t*) noexcept nogil

    uint32_t hv_begun(uint64_t x)
    uint32_t hv_mixed(uint32_t x)
    int32_t hv_permille(uint64_t sum)
    void hv_summarise(const hv_block* block, const uint8_t* alive, hv_summary* summary)
    hv_kernels hv_choose_kernels(int plain, const char** vectors)


cdef enum:
    KIND_FREE = 0
    KIND_CLASS = 1
    KIND_PREFERENCE = 2
    KIND_GROUP = 3
    KIND_COUNTER = 4
    MAX_ENTRIES = 65536
    MAX_GROUPS = 64
    LOG = 4096            # changes remembered; a power of 2
    SMALL_DOMAIN = 64     # up to so many nodes a change of a domain's count is noted node by node
    HOT_SHAPES = 16
    RECENT_SHAPES = 256
    ONE = 1 << 30         # a whole share, see _rules.py

# Classes and preferences have `column` alone (words of bits, values); see Group and Counter for the others.
cdef struct Entry:
    int64_t id            # serial << 16 | index, so never the same again
    int32_t kind
    int32_t next_free
    void* column
    Group* group
    Counter* counter

cdef struct Group:
    int32_t* domain       # [slot] domain + 1, 0 for none
    int32_t* next         # [slot] next slot + 1 of the same domain
    int32_t* previous
    int32_t* head         # [domain + 1] first slot + 1
    int32_t* population   # [domain + 1]
    int32_t domains       # length of the two before

cdef struct Counter:
    Group* group
    int32_t* counts       # [domain + 1]
    int32_t size
    uint64_t version      # moves on when a count changed that was not noted node by node

# What a request asks for, all zero where nothing is: equal requests are equal bytes.
cdef struct Shape:
    int32_t cpu, memory, disk, bits, slot, policy
    int32_t utilisation_weight, load_weight, penalty_weight
    int32_t classes, affinities, hards, preferences, softs
    int64_t class_ids[4]
    int64_t hard_ids[16]          # affinity first
    int64_t preference_ids[4]
    int64_t preference_weights[4]
    int64_t soft_ids[8]
    int32_t soft_kinds[8]
    int32_t soft_weights[8]

cdef struct Wanted:
    Shape shape
    uint64_t hash                 # of shape
    int32_t adds
    int64_t add_ids[32]

# Scores of all nodes under one shape, kept for its next use.
cdef struct Hot:
    Shape shape
    uint64_t hash
    int32_t* scores               # [slot]
    int32_t* peaks                # [block] highest score; padded with FAILS to a multiple of BLOCK
    int32_t* tie_keys             # [block] smallest tie key of those that score the peak, if not stale
    uint8_t* tie_stale            # [block]
    int64_t allocated             # blocks
    int64_t blocks                # blocks that were judged; 0 where nothing is known
    uint64_t seen                 # changes up to this one are in
    uint64_t versions             # of the counters
    uint64_t used
    uint32_t tie_seed

cdef struct Table:
    hv_block* blocks
    hv_summary* summaries
    uint64_t* hashes
    int32_t* cpu_total
    int32_t* memory_total
    int32_t* disk_total
    int16_t* load
    uint8_t* alive
    int32_t* freed
    int64_t capacity, high, live, freed_count
    Entry* entries
    int32_t entries_used, entries_allocated, first_free, entries_live, groups_live
    int64_t serial
    int32_t log[4096]
    uint64_t changes              # log[changes % LOG] is written next
    Hot hot[16 + 1]               # the last one is for shapes that were not seen lately
    uint64_t clock
    uint64_t recent[256]
    int32_t* domain_values        # scratch of the plan being carried out
    int64_t domain_values_size
    hv_kernels kernels


cdef inline int grow(void** memory, int64_t old_bytes, int64_t new_bytes) noexcept nogil:
    """Move to a larger allocation (of whole cache lines), the rest zero. 0 when there is no memory: nothing changed."""
    cdef void* larger = NULL
    if posix_memalign(&larger, 64, <size_t> new_bytes) != 0:
        return 0
    if memory[0] != NULL:
        memcpy(larger, memory[0], old_bytes)
    memset(<char*> larger + old_bytes, 0, new_bytes - old_bytes)
    free(memory[0])
    memory[0] = larger
    return 1


cdef inline int64_t room_for(int64_t wanted, int64_t have) noexcept nogil:
    """Next size of an array that has to hold ``wanted``: half as much again, a multiple of BLOCK."""
    cdef int64_t size = have + have // 2
    if size < wanted:
        size = wanted
    return (size + BLOCK - 1) // BLOCK * BLOCK


cdef inline int grow_entry(Entry* entry, int64_t old, int64_t new) noexcept nogil:
    """Make an entry's columns reach to slot ``new``."""
    if entry.kind == KIND_CLASS:
        return grow(&entry.column, old // BLOCK * 8, new // BLOCK * 8)
    if entry.kind == KIND_PREFERENCE:
        return grow(&entry.column, old * 4, new * 4)
    if entry.kind == KIND_GROUP:
        return (
            grow(<void**> &entry.group.domain, old * 4, new * 4)
            and grow(<void**> &entry.group.next, old * 4, new * 4)
            and grow(<void**> &entry.group.previous, old * 4, new * 4)
        )
    return 1


cdef inline int reach(Table* t, int64_t slots) noexcept nogil:
    """Make all columns reach to ``slots``. Where it fails some are longer than ``capacity`` says, and no harm done."""
    cdef int64_t old = t.capacity, new, i
    if slots <= old:
        return 1
    new = room_for(slots, old)
    for i in range(t.entries_used):
        if not grow_entry(&t.entries[i], old, new):
            return 0
    if not (
        grow(<void**> &t.blocks, old // BLOCK * sizeof(hv_block), new // BLOCK * sizeof(hv_block))
        and grow(<void**> &t.summaries, old // BLOCK * sizeof(hv_summary), new // BLOCK * sizeof(hv_summary))
        and grow(<void**> &t.hashes, old * 8, new * 8)
        and grow(<void**> &t.cpu_total, old * 4, new * 4)
        and grow(<void**> &t.memory_total, old * 4, new * 4)
        and grow(<void**> &t.disk_total, old * 4, new * 4)
        and grow(<void**> &t.load, old * 2, new * 2)
        and grow(<void**> &t.alive, old, new)
        and grow(<void**> &t.freed, old * 4, new * 4)
    ):
        return 0
    for i in range(old, new):
        t.blocks[i // BLOCK].cpu_free[i % BLOCK] = -1
    for i in range(old // BLOCK, new // BLOCK):
        t.summaries[i].stale = 1
    t.capacity = new
    return 1


cdef inline void touch(Table* t, int64_t slot) noexcept nogil:
    """Note that a node may be judged otherwise from now on."""
    t.log[t.changes % LOG] = <int32_t> slot
    t.changes += 1
    t.summaries[slot // BLOCK].stale = 1


cdef inline void set_shares(Table* t, int64_t slot) noexcept nogil:
    """Work out base and rates again; see share() in _rules.py. Both totals 0: all is 0."""
    cdef hv_block* block = &t.blocks[slot // BLOCK]
    cdef int64_t at = slot % BLOCK, cpu = t.cpu_total[slot], memory = t.memory_total[slot]
    cdef uint64_t base = 0, one, cpu_rate = 0, memory_rate = 0
    if cpu > 0:
        one = <uint64_t> (cpu - block.cpu_free[at]) * ONE // <uint64_t> cpu
        base += one if one < ONE else ONE
        cpu_rate = ONE // <uint64_t> cpu
    if memory > 0:
        one = <uint64_t> (memory - block.memory_free[at]) * ONE // <uint64_t> memory
        base += one if one < ONE else ONE
        memory_rate = ONE // <uint64_t> memory
    if cpu == 0 or memory == 0:
        base, cpu_rate, memory_rate = 2 * base, 2 * cpu_rate, 2 * memory_rate
    block.base[at] = <uint32_t> base
    block.cpu_rate[at] = <uint32_t> cpu_rate
    block.memory_rate[at] = <uint32_t> memory_rate


cdef inline Entry* entry_of(Table* t, int64_t id, int32_t kind) noexcept nogil:
    """The entry of an id, or NULL when there is none of that kind (any more)."""
    cdef int64_t index = id & 0xFFFF
    if index >= t.entries_used or t.entries[index].id != id or t.entries[index].kind != kind:
        return NULL
    return &t.entries[index]


cdef inline int64_t new_entry(Table* t, int32_t kind, Group* group) noexcept nogil:
    """Make an entry; returns its id, or 0 without memory. A counter counts in ``group``."""
    cdef int64_t index, size
    cdef Entry* entry
    if t.first_free:
        index = t.first_free
    else:
        index = t.entries_used if t.entries_used else 1  # index 0 stands for no entry
        if index >= t.entries_allocated:
            size = room_for(index + 1, t.entries_allocated)
            if not grow(<void**> &t.entries, t.entries_allocated * sizeof(Entry), size * sizeof(Entry)):
                return 0
            t.entries_allocated = <int32_t> size
    entry = &t.entries[index]
    entry.kind = kind
    if kind == KIND_GROUP:
        if not (grow(<void**> &entry.group, 0, sizeof(Group)) and grow(<void**> &entry.group.head, 0, BLOCK * 4)
                and grow(<void**> &entry.group.population, 0, BLOCK * 4)):
            clear_entry(entry)
            return 0
        entry.group.domains = BLOCK
    elif kind == KIND_COUNTER:
        if not (grow(<void**> &entry.counter, 0, sizeof(Counter)) and grow(<void**> &entry.counter.counts, 0, BLOCK * 4)):
            clear_entry(entry)
            return 0
        entry.counter.size = BLOCK
        entry.counter.group = group
    if t.capacity and not grow_entry(entry, 0, t.capacity):
        clear_entry(entry)
        return 0
    if t.first_free:
        t.first_free = entry.next_free
    else:
        t.entries_used = <int32_t> (index + 1)
    t.serial += 1
    t.entries_live += 1
    t.groups_live += kind == KIND_GROUP
    entry.id = t.serial << 16 | index
    return entry.id


cdef inline void clear_entry(Entry* entry) noexcept nogil:
    """Free all that an entry holds, also one that is half made."""
    if entry.group != NULL:
        free(entry.group.domain)
        free(entry.group.next)
        free(entry.group.previous)
        free(entry.group.head)
        free(entry.group.population)
        free(entry.group)
    if entry.counter != NULL:
        free(entry.counter.counts)
        free(entry.counter)
    free(entry.column)
    entry.column, entry.group, entry.counter = NULL, NULL, NULL
    entry.kind = KIND_FREE
    entry.id = 0


cdef inline void drop_entry(Table* t, Entry* entry) noexcept nogil:
    """Forget an entry; with a group its counters."""
    cdef int32_t i
    cdef int32_t index = <int32_t> (entry.id & 0xFFFF)
    if entry.kind == KIND_GROUP:
        t.groups_live -= 1
        for i in range(t.entries_used):
            if t.entries[i].kind == KIND_COUNTER and t.entries[i].counter.group == entry.group:
                drop_entry(t, &t.entries[i])
    clear_entry(entry)
    entry.next_free = t.first_free
    t.first_free = index
    t.entries_live -= 1


cdef inline void touch_domain(Table* t, Counter* counter, int64_t domain) noexcept nogil:
    """Note that a count changed: node by node where there are few, by the counter's version where there are many."""
    cdef Group* group = counter.group
    cdef int32_t slot
    if domain + 1 >= group.domains:
        return  # no node is there
    if group.population[domain + 1] > SMALL_DOMAIN:
        counter.version += 1
        return
    slot = group.head[domain + 1]
    while slot:
        touch(t, slot - 1)
        slot = group.next[slot - 1]


cdef inline int32_t count_of(const Counter* counter, int64_t domain) noexcept nogil:
    return counter.counts[domain + 1] if domain + 1 < counter.size else 0


cdef inline int set_count(Table* t, Counter* counter, int64_t domain, int32_t count) noexcept nogil:
    """0 without memory: nothing changed."""
    cdef int64_t size
    if domain + 1 >= counter.size:
        size = room_for(domain + 2, counter.size)
        if not grow(<void**> &counter.counts, <int64_t> counter.size * 4, size * 4):
            return 0
        counter.size = <int32_t> size
    counter.counts[domain + 1] = count
    touch_domain(t, counter, domain)
    return 1


cdef inline int set_domain(Table* t, Group* group, int64_t slot, int64_t domain) noexcept nogil:
    """Move a node to a domain, or to none (-1). 0 without memory: nothing changed."""
    cdef int64_t size
    cdef int32_t old = group.domain[slot], after, before
    if domain + 1 >= group.domains:
        size = room_for(domain + 2, group.domains)
        if not (
            grow(<void**> &group.head, <int64_t> group.domains * 4, size * 4)
            and grow(<void**> &group.population, <int64_t> group.domains * 4, size * 4)
        ):
            return 0
        group.domains = <int32_t> size
    if old:
        after, before = group.next[slot], group.previous[slot]
        if after:
            group.previous[after - 1] = before
        if before:
            group.next[before - 1] = after
        else:
            group.head[old] = after
        group.population[old] -= 1
    group.domain[slot] = <int32_t> (domain + 1)
    group.next[slot] = group.previous[slot] = 0
    if domain >= 0:
        after = group.head[domain + 1]
        group.next[slot] = after
        if after:
            group.previous[after - 1] = <int32_t> (slot + 1)
        group.head[domain + 1] = <int32_t> (slot + 1)
        group.population[domain + 1] += 1
    touch(t, slot)
    return 1
