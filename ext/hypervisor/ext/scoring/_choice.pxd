"""The native table's decisions: a request made ready, nodes judged by blocks or one by one, the best one found.

Everything works over one ``Table``, without Python and without the GIL. :mod:`._table_c` has checked the slots and ids
of a request before, and lets nobody else change the table meanwhile.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

from hypervisor.ext.scoring._engine cimport (
    BLOCK, FAILS, HOT_SHAPES, KIND_CLASS, KIND_COUNTER, KIND_PREFERENCE, LOG, MAX_COLUMNS, RECENT_SHAPES,
    Counter, Entry, Group, Hot, Shape, Table, Wanted,
    count_of, entry_of, grow, hv_block, hv_begun, hv_mixed, hv_permille, hv_plan, hv_summarise, hv_summary, room_for,
    set_count, set_shares, touch,
)


cdef enum:
    OUT_OF_RANGE = -1             # a count would leave 0..MAX_AMOUNT
    SOFT_PREFER = 0
    SOFT_AVOID = 1
    SOFT_SPREAD = 2

# A request against the table as it is now, ids looked up.
cdef struct Resolved:
    hv_plan plan
    int64_t slot
    bint spreads                  # policy
    int32_t utilisation_weight
    int32_t highest_rest          # most that all scores but utilisation, load and penalty can add up to
    int32_t hards, affinities, softs
    Counter* hard[16]             # affinity first
    Counter* soft[8]
    int32_t* soft_kinds
    int32_t* soft_weights
    uint64_t versions

cdef struct Found:
    int64_t slot                  # -1: none
    int32_t score


cdef inline void resolve(Table* t, const Shape* shape, Resolved* r) noexcept nogil:
    """Look all ids up; they are known to be there. Groups are left to :func:`value_domains`."""
    cdef int32_t i
    cdef hv_plan* plan = &r.plan
    plan.cpu, plan.memory, plan.disk, plan.bits = shape.cpu, shape.memory, shape.disk, shape.bits
    plan.load_weight, plan.penalty_weight = shape.load_weight, shape.penalty_weight
    r.slot = shape.slot
    r.spreads = shape.policy != 0
    r.utilisation_weight = shape.utilisation_weight
    plan.constant = 1000 * shape.utilisation_weight if r.spreads else 0
    plan.share_weight = -shape.utilisation_weight if r.spreads else shape.utilisation_weight
    plan.groups = 0
    plan.classes = shape.classes
    for i in range(shape.classes):
        plan.class_words[i] = <const uint64_t*> entry_of(t, shape.class_ids[i], KIND_CLASS).column
    r.highest_rest = 0
    plan.columns = shape.preferences
    for i in range(shape.preferences):
        plan.column[i] = <const int32_t*> entry_of(t, shape.preference_ids[i], KIND_PREFERENCE).column
        plan.column_weight[i] = <int32_t> shape.preference_weights[i]
        r.highest_rest += 1000 * plan.column_weight[i]
    r.versions = 0
    r.hards, r.affinities, r.softs = shape.hards, shape.affinities, shape.softs
    for i in range(shape.hards):
        r.hard[i] = entry_of(t, shape.hard_ids[i], KIND_COUNTER).counter
        r.versions += r.hard[i].version
    r.soft_kinds, r.soft_weights = <int32_t*> shape.soft_kinds, <int32_t*> shape.soft_weights
    for i in range(shape.softs):
        r.soft[i] = entry_of(t, shape.soft_ids[i], KIND_COUNTER).counter
        r.versions += r.soft[i].version
        r.highest_rest += 1000 * shape.soft_weights[i]


cdef inline int32_t soft_score(int32_t kind, int64_t domain, int32_t count) noexcept nogil:
    """0..1000, as _rules.py says. ``domain`` is -1 for none, with count 0."""
    if kind == SOFT_PREFER:
        return 1000 if count > 0 else 0
    if kind == SOFT_AVOID:
        return 0 if count > 0 else 1000
    return 1000 // (1 + count) if domain >= 0 else 0


cdef inline int32_t judge_one(Table* t, const Resolved* r, int64_t slot) noexcept nogil:
    """The score of one node, or FAILS: what the kernel makes of it, without its block."""
    cdef const hv_plan* plan = &r.plan
    cdef const hv_block* block = &t.blocks[slot // BLOCK]
    cdef int64_t at = slot % BLOCK, domain
    cdef int32_t i, count, score
    cdef uint32_t total
    if (
        plan.cpu > block.cpu_free[at]
        or plan.memory > block.memory_free[at]
        or plan.disk > block.disk_free[at]
        or plan.bits & ~block.bits[at]
    ):
        return FAILS
    for i in range(plan.classes):
        if not (plan.class_words[i][slot // BLOCK] >> at) & 1:
            return FAILS
    for i in range(r.hards):
        domain = r.hard[i].group.domain[slot] - 1
        count = count_of(r.hard[i], domain) if domain >= 0 else 0
        if (count == 0) if i < r.affinities else (count > 0):
            return FAILS
    total = (
        block.base[at]
        + block.cpu_rate[at] * <uint32_t> plan.cpu
        + block.memory_rate[at] * <uint32_t> plan.memory
    )
    score = plan.constant + plan.share_weight * hv_permille(total)
    score += block.load_score[at] * plan.load_weight + block.penalty_score[at] * plan.penalty_weight
    for i in range(plan.columns):
        score += plan.column[i][slot] * plan.column_weight[i]
    for i in range(r.softs):
        domain = r.soft[i].group.domain[slot] - 1
        count = count_of(r.soft[i], domain) if domain >= 0 else 0
        score += soft_score(r.soft_kinds[i], domain, count) * r.soft_weights[i]
    return score


cdef inline int value_domains(Table* t, Resolved* r) noexcept nogil:
    """For each group of the request's counters, what each of its domains adds to a score, or FAILS. 0 without memory.

    Afterwards ``plan.domain_value[i]`` reaches to the last domain that a node of the group is in.
    """
    cdef Group* groups[24]
    cdef int32_t found = 0, i, j, domain, count, size
    cdef int64_t needed = 0, offset = 0
    cdef Counter* counter
    cdef int32_t* values
    for i in range(r.hards + r.softs):
        counter = r.hard[i] if i < r.hards else r.soft[i - r.hards]
        for j in range(found):
            if groups[j] == counter.group:
                break
        else:
            groups[found] = counter.group
            needed += counter.group.domains
            found += 1
    if needed > t.domain_values_size:
        offset = room_for(needed, 0)
        if not grow(<void**> &t.domain_values, 0, offset * 4):
            return 0
        t.domain_values_size = offset
        offset = 0
    for j in range(found):
        values = t.domain_values + offset
        size = groups[j].domains
        offset += size
        memset(values, 0, <size_t> size * 4)
        r.plan.domain[j] = groups[j].domain
        r.plan.domain_value[j] = values
        for i in range(r.softs):
            counter = r.soft[i]
            if counter.group != groups[j]:
                continue
            for domain in range(size):
                count = counter.counts[domain] if 0 < domain < counter.size else 0
                values[domain] += soft_score(r.soft_kinds[i], domain - 1, count) * r.soft_weights[i]
        for i in range(r.hards):
            counter = r.hard[i]
            if counter.group != groups[j]:
                continue
            for domain in range(size):
                count = counter.counts[domain] if 0 < domain < counter.size else 0
                if (count == 0) if i < r.affinities else (count > 0):
                    values[domain] = FAILS
    r.plan.groups = found
    return 1


cdef inline bint can_do_better(Table* t, const Resolved* r, int64_t number, int32_t best) noexcept nogil:
    """Whether a block may have a node that passes and scores at least ``best``; never wrongly False."""
    cdef hv_summary* s = &t.summaries[number]
    cdef const hv_plan* plan = &r.plan
    cdef int32_t i, share, bound
    cdef uint64_t word = <uint64_t> -1
    if s.stale:
        hv_summarise(&t.blocks[number], t.alive + number * BLOCK, s)
    if plan.cpu > s.cpu_free or plan.memory > s.memory_free or plan.disk > s.disk_free or plan.bits & ~s.bits:
        return False
    for i in range(plan.classes):
        word &= plan.class_words[i][number]
    if word == 0:
        return False
    if best < 0:
        return True
    if r.spreads:
        share = hv_permille(
            <uint64_t> s.base_min + <uint64_t> s.cpu_rate_min * plan.cpu + <uint64_t> s.memory_rate_min * plan.memory
        )
        bound = (1000 - share) * r.utilisation_weight
    else:
        share = hv_permille(
            <uint64_t> s.base_max + <uint64_t> s.cpu_rate_max * plan.cpu + <uint64_t> s.memory_rate_max * plan.memory
        )
        bound = share * r.utilisation_weight
    bound += s.load_max * plan.load_weight + s.penalty_max * plan.penalty_weight + r.highest_rest
    return bound >= best


cdef inline int judge_all(Table* t, Resolved* r, Hot* hot, bint only_best) noexcept nogil:
    """Judge every block into ``hot``; with ``only_best`` without those that cannot hold the best. 0 without memory."""
    cdef int64_t blocks = (t.high + BLOCK - 1) // BLOCK, number, size, old = hot.allocated
    cdef int32_t best = FAILS, peak
    hot.blocks = 0
    if blocks > old:
        size = room_for(blocks, old)
        if not (
            grow(<void**> &hot.scores, 0, size * BLOCK * 4)
            and grow(<void**> &hot.peaks, 0, size * 4)
            and grow(<void**> &hot.tie_keys, 0, size * 4)
            and grow(<void**> &hot.tie_stale, 0, size)
        ):
            return 0
        hot.allocated = size
    if not value_domains(t, r):
        return 0
    for number in range(blocks):
        if not can_do_better(t, r, number, best):
            hot.peaks[number] = FAILS
            if not only_best:
                memset(hot.scores + number * BLOCK, 0xFF, BLOCK * 4)  # FAILS
            continue
        peak = t.kernels.judge(&t.blocks[number], &t.summaries[number], &r.plan, <size_t> number, hot.scores + number * BLOCK)
        hot.peaks[number] = peak
        if only_best and peak > best:
            best = peak
    for number in range(blocks, (blocks + BLOCK - 1) // BLOCK * BLOCK):
        hot.peaks[number] = FAILS
    memset(hot.tie_stale, 1, <size_t> hot.allocated)
    hot.blocks = blocks
    hot.seen = t.changes
    hot.versions = r.versions
    return 1


cdef inline int bring_up_to_date(Table* t, Resolved* r, Hot* hot) noexcept nogil:
    """Judge again what has changed since, one by one or all when that is much. 0 without memory."""
    cdef uint64_t pending = t.changes - hot.seen
    cdef int64_t slot, number
    cdef int32_t score, old
    if (
        hot.blocks != (t.high + BLOCK - 1) // BLOCK
        or hot.versions != r.versions
        or pending > LOG
        or pending > <uint64_t> t.high // 16 + 16
    ):
        return judge_all(t, r, hot, False)
    while hot.seen != t.changes:
        slot = t.log[hot.seen % LOG]
        hot.seen += 1
        number = slot // BLOCK
        score = judge_one(t, r, slot)
        old = hot.scores[slot]
        if score == old:
            continue
        hot.scores[slot] = score
        hot.tie_stale[number] = 1
        if score > hot.peaks[number]:
            hot.peaks[number] = score
        elif old == hot.peaks[number]:
            hot.peaks[number] = t.kernels.peak(hot.scores + number * BLOCK)
    return 1


cdef inline void find_best(Table* t, Hot* hot, uint32_t seed, Found* found) noexcept nogil:
    """The best node of a column that was judged; ``seed`` is hv_begun."""
    cdef int64_t part = 0, number, slot, first = -1
    cdef int32_t best = FAILS, peak, least = 0
    found.slot = -1
    while part < hot.blocks:
        peak = t.kernels.peak(hot.peaks + part)
        part += BLOCK
        if peak > best:
            best = peak
    if best < 0:
        return
    found.score = best
    if hot.tie_seed != seed:
        memset(hot.tie_stale, 1, <size_t> hot.allocated)
        hot.tie_seed = seed
    for number in range(hot.blocks):
        if hot.peaks[number] != best:
            continue
        if hot.tie_stale[number]:
            hot.tie_keys[number] = t.kernels.tie(&t.blocks[number], hot.scores + number * BLOCK, best, seed)
            hot.tie_stale[number] = 0
        if first < 0 or hot.tie_keys[number] < least:
            first, least = number, hot.tie_keys[number]
    for number in range(first, hot.blocks):
        if hot.peaks[number] != best or hot.tie_keys[number] != least:
            continue
        for slot in range(number * BLOCK, (number + 1) * BLOCK):
            if hot.scores[slot] == best and tie_key(t, slot, seed) == least:
                # Two keys are the same where the hashes are the same when folded: then the hashes decide, then slots.
                if found.slot < 0 or t.hashes[slot] < t.hashes[found.slot]:
                    found.slot = slot


cdef inline int32_t tie_key(Table* t, int64_t slot, uint32_t seed) noexcept nogil:
    """As the kernel has it: signed, in the same order."""
    return <int32_t> (hv_mixed(t.blocks[slot // BLOCK].tie_hash[slot % BLOCK] ^ seed) ^ <uint32_t> 0x80000000)


cdef inline Hot* hot_shape(Table* t, const Wanted* wanted) noexcept nogil:
    """The kept column of a shape, or one to keep it in if it was met lately, or NULL for one seen for the first time."""
    cdef int32_t i, oldest = 0
    t.clock += 1
    for i in range(HOT_SHAPES):
        if t.hot[i].hash == wanted.hash and memcmp(&t.hot[i].shape, &wanted.shape, sizeof(Shape)) == 0:
            t.hot[i].used = t.clock
            return &t.hot[i]
        if t.hot[i].used < t.hot[oldest].used:
            oldest = i
    if t.recent[wanted.hash % RECENT_SHAPES] != wanted.hash:
        t.recent[wanted.hash % RECENT_SHAPES] = wanted.hash
        return NULL
    t.hot[oldest].shape = wanted.shape
    t.hot[oldest].hash = wanted.hash
    t.hot[oldest].used = t.clock
    t.hot[oldest].blocks = 0
    return &t.hot[oldest]


cdef inline int choose(Table* t, const Wanted* wanted, uint64_t seed, Found* found) noexcept nogil:
    """The best node for a request; ``found.slot`` is -1 when there is none. 0 without memory."""
    cdef Resolved r
    cdef Hot* hot
    resolve(t, &wanted.shape, &r)
    found.slot = -1
    if r.slot >= 0:
        if r.slot < t.high:
            found.score = judge_one(t, &r, r.slot)
            found.slot = r.slot if found.score >= 0 else -1
        return 1
    hot = hot_shape(t, wanted)
    if hot != NULL:
        if not bring_up_to_date(t, &r, hot):
            return 0
    else:
        hot = &t.hot[HOT_SHAPES]
        if not judge_all(t, &r, hot, True):
            return 0
    find_best(t, hot, hv_begun(seed), found)
    return 1


cdef inline int add_to_counts(Table* t, const Wanted* wanted, int64_t slot, int32_t delta) noexcept nogil:
    """Count an instance in, or out (-1). 0 without memory, OUT_OF_RANGE where a count would leave it: nothing changed."""
    cdef int32_t i, j, count
    cdef int64_t domain
    cdef bint in_range
    cdef Counter* counter
    for i in range(wanted.adds):
        counter = entry_of(t, wanted.add_ids[i], KIND_COUNTER).counter
        domain = counter.group.domain[slot] - 1
        if domain < 0:
            continue
        count = count_of(counter, domain) + delta
        in_range = 0 <= count < (1 << 30)
        if not in_range or not set_count(t, counter, domain, count):
            for j in range(i):
                counter = entry_of(t, wanted.add_ids[j], KIND_COUNTER).counter
                domain = counter.group.domain[slot] - 1
                if domain >= 0:
                    set_count(t, counter, domain, count_of(counter, domain) - delta)  # there is room for it
            return OUT_OF_RANGE if not in_range else 0
    return 1


cdef inline void take(Table* t, int64_t slot, int64_t cpu, int64_t memory, int64_t disk) noexcept nogil:
    """Lower what is free; the result is known to be in range."""
    cdef hv_block* block = &t.blocks[slot // BLOCK]
    cdef int64_t at = slot % BLOCK
    block.cpu_free[at] -= <int32_t> cpu
    block.memory_free[at] -= <int32_t> memory
    block.disk_free[at] -= <int32_t> disk
    set_shares(t, slot)
    touch(t, slot)


cdef inline int place_one(Table* t, const Wanted* wanted, uint64_t seed, Found* found) noexcept nogil:
    """Choose, and reserve there. 0 without memory, OUT_OF_RANGE for a count: nothing is reserved."""
    cdef int done
    if not choose(t, wanted, seed, found):
        return 0
    if found.slot < 0:
        return 1
    if wanted.adds:
        done = add_to_counts(t, wanted, found.slot, 1)
        if done != 1:
            return done
    take(t, found.slot, wanted.shape.cpu, wanted.shape.memory, wanted.shape.disk)
    return 1


cdef inline void take_back(Table* t, const Wanted* wanted, int64_t slot) noexcept nogil:
    """Undo :func:`place_one`, right after it."""
    add_to_counts(t, wanted, slot, -1)
    take(t, slot, -wanted.shape.cpu, -wanted.shape.memory, -wanted.shape.disk)
