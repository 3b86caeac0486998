"""The native table's answers about many nodes or many requests, over :mod:`._choice`; neither Python nor the GIL here."""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport qsort

from hypervisor.ext.scoring._arguments cimport MAX_AMOUNT
from hypervisor.ext.scoring._choice cimport (
    Found, Resolved, choose, judge_all, judge_one, place_one, resolve, take_back, tie_key,
)
from hypervisor.ext.scoring._engine cimport BLOCK, HOT_SHAPES, Table, Wanted, hv_begun, hv_block


cdef struct Candidate:
    int32_t slot, score, key
    uint64_t node_hash


cdef inline int compare_candidates(const void* left, const void* right) noexcept nogil:
    """Best first; see _rules.tie_key."""
    cdef const Candidate* a = <const Candidate*> left
    cdef const Candidate* b = <const Candidate*> right
    if a.score != b.score:
        return -1 if a.score > b.score else 1
    if a.key != b.key:
        return -1 if a.key < b.key else 1
    if a.node_hash != b.node_hash:
        return -1 if a.node_hash < b.node_hash else 1
    return (a.slot > b.slot) - (a.slot < b.slot)


cdef inline int rank(Table* t, const Wanted* wanted, uint64_t seed, Candidate* found, int64_t* passed) noexcept nogil:
    """All nodes that pass, best first; there is room for all. 0 without memory."""
    cdef Resolved r
    cdef int64_t slot
    cdef const int32_t* scores
    passed[0] = 0
    resolve(t, &wanted.shape, &r)
    if not judge_all(t, &r, &t.hot[HOT_SHAPES], False):
        return 0
    scores = t.hot[HOT_SHAPES].scores
    for slot in range(t.high):
        if scores[slot] >= 0 and (r.slot < 0 or r.slot == slot):
            found[passed[0]].slot = <int32_t> slot
            found[passed[0]].score = scores[slot]
            found[passed[0]].key = tie_key(t, slot, hv_begun(seed))
            found[passed[0]].node_hash = t.hashes[slot]
            passed[0] += 1
    qsort(found, <size_t> passed[0], sizeof(Candidate), compare_candidates)
    return 1


cdef inline int choose_many(
    Table* t, const Wanted** wanted, const uint64_t* seeds, int64_t count, bint reserve, Found* found
) noexcept nogil:
    """Choose for each request, or with ``reserve`` place each. Otherwise as place_one: then nothing is reserved."""
    cdef int64_t i
    cdef int done
    for i in range(count):
        if reserve:
            done = place_one(t, wanted[i], seeds[i], &found[i])
        else:
            done = choose(t, wanted[i], seeds[i], &found[i])
        if done != 1:
            while reserve and i > 0:
                i -= 1
                if found[i].slot >= 0:
                    take_back(t, wanted[i], found[i].slot)
            return done
    return 1


cdef inline int fill(Table* t, const Wanted* w, int64_t left, int64_t* numbers) noexcept nogil:
    """How many more of a request each node takes, ``left`` in all, into ``numbers`` (zeros); returns as place_one."""
    cdef Found found
    cdef Resolved r
    cdef int done = 1
    cdef bint independent = True
    cdef int32_t i, j
    cdef int64_t slot
    for i in range(w.adds):
        for j in range(w.shape.hards):
            independent = independent and w.add_ids[i] != w.shape.hard_ids[j]
    if independent:
        resolve(t, &w.shape, &r)
        for slot in range(t.high):
            if left > 0 and (r.slot < 0 or r.slot == slot) and judge_one(t, &r, slot) >= 0:
                numbers[slot] = multiple(t, w, slot, left)
                left -= numbers[slot]
        return 1
    while left > 0:
        done = place_one(t, w, 0, &found)
        if done != 1 or found.slot < 0:
            break
        numbers[found.slot] += 1
        left -= 1
    for slot in range(t.high):
        for i in range(<int32_t> numbers[slot]):
            take_back(t, w, slot)
    return done


cdef inline int64_t multiple(Table* t, const Wanted* w, int64_t slot, int64_t most) noexcept nogil:
    """How often the resources of a request fit on a node, at most ``most`` times or MAX_AMOUNT times."""
    cdef hv_block* block = &t.blocks[slot // BLOCK]
    cdef int64_t at = slot % BLOCK
    if most > MAX_AMOUNT:
        most = MAX_AMOUNT
    if w.shape.cpu and block.cpu_free[at] // w.shape.cpu < most:
        most = block.cpu_free[at] // w.shape.cpu
    if w.shape.memory and block.memory_free[at] // w.shape.memory < most:
        most = block.memory_free[at] // w.shape.memory
    if w.shape.disk and block.disk_free[at] // w.shape.disk < most:
        most = block.disk_free[at] // w.shape.disk
    return most
