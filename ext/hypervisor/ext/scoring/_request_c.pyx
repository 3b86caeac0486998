"""Native twin of _request_py: the same names, the same behaviour, over a C struct."""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t

from hypervisor.ext.scoring._arguments cimport MAX_AMOUNT, MAX_NODES, within
from hypervisor.ext.scoring._choice cimport SOFT_AVOID, SOFT_PREFER, SOFT_SPREAD
from hypervisor.ext.scoring._engine cimport Wanted


cdef int32_t put_ids(object ids, int64_t* into, int32_t have, int32_t most, str what) except -1:
    """Append ids; returns how many there are then."""
    cdef int64_t number
    for one in ids:
        number = within("id", one, 0, (<int64_t> 1 << 62) + ((<int64_t> 1 << 62) - 1))
        if have == most:
            raise ValueError(f"{what}: at most {most} ids")
        into[have] = number
        have += 1
    return have


@cython.final
cdef class Request:
    """See :class:`._request_py.Request`."""

    def __init__(
        self, *, cpu=0, memory=0, disk=0, bits=0, classes=(), slot=-1, affinity=(), anti_affinity=(), adds=(),
        policy=0, utilisation_weight=1, load_weight=0, penalty_weight=0, preferences=(), prefer=(), avoid=(), spread=(),
    ):
        cdef Wanted* w = &self.wanted
        cdef int32_t count, kind
        cdef size_t i
        if w.hash:
            raise TypeError("a request never changes")
        w.shape.cpu = <int32_t> within("cpu", cpu, 0, MAX_AMOUNT)
        w.shape.memory = <int32_t> within("memory", memory, 0, MAX_AMOUNT)
        w.shape.disk = <int32_t> within("disk", disk, 0, MAX_AMOUNT)
        w.shape.bits = <int32_t> within("bits", bits, 0, 0x7FFFFFFF)
        w.shape.slot = <int32_t> within("slot", slot, -1, MAX_NODES - 1)
        w.shape.policy = <int32_t> within("policy", policy, 0, 1)
        w.shape.utilisation_weight = <int32_t> within("utilisation_weight", utilisation_weight, 0, 1000)
        w.shape.load_weight = <int32_t> within("load_weight", load_weight, 0, 1000)
        w.shape.penalty_weight = <int32_t> within("penalty_weight", penalty_weight, 0, 1000)
        w.shape.classes = put_ids(classes, w.shape.class_ids, 0, 4, "classes")
        w.shape.affinities = put_ids(affinity, w.shape.hard_ids, 0, 16, "affinity and anti_affinity")
        w.shape.hards = put_ids(
            anti_affinity, w.shape.hard_ids, w.shape.affinities, 16, "affinity and anti_affinity"
        )
        w.adds = put_ids(adds, w.add_ids, 0, 32, "adds")
        count = 0
        for one, weight in preferences:
            count = put_ids((one,), w.shape.preference_ids, count, 4, "preferences")
            w.shape.preference_weights[count - 1] = within("weight", weight, 0, 1000)
        w.shape.preferences = count
        count = 0
        for kind, pairs in ((SOFT_PREFER, prefer), (SOFT_AVOID, avoid), (SOFT_SPREAD, spread)):
            for one, weight in pairs:
                count = put_ids((one,), w.shape.soft_ids, count, 8, "prefer, avoid and spread")
                w.shape.soft_kinds[count - 1] = kind
                w.shape.soft_weights[count - 1] = <int32_t> within("weight", weight, 0, 1000)
        w.shape.softs = count
        w.hash = 0xCBF29CE484222325ULL
        for i in range(sizeof(w.shape) // 4):
            w.hash = (w.hash ^ (<uint32_t*> &w.shape)[i]) * 0x100000001B3ULL
            w.hash ^= w.hash >> 29
        w.hash |= 1

    cdef tuple soft(self, int32_t kind):
        cdef int32_t i
        return tuple([
            (self.wanted.shape.soft_ids[i], self.wanted.shape.soft_weights[i])
            for i in range(self.wanted.shape.softs)
            if self.wanted.shape.soft_kinds[i] == kind
        ])

    @property
    def cpu(self):
        return self.wanted.shape.cpu

    @property
    def memory(self):
        return self.wanted.shape.memory

    @property
    def disk(self):
        return self.wanted.shape.disk

    @property
    def bits(self):
        return self.wanted.shape.bits

    @property
    def slot(self):
        return self.wanted.shape.slot

    @property
    def policy(self):
        return self.wanted.shape.policy

    @property
    def utilisation_weight(self):
        return self.wanted.shape.utilisation_weight

    @property
    def load_weight(self):
        return self.wanted.shape.load_weight

    @property
    def penalty_weight(self):
        return self.wanted.shape.penalty_weight

    @property
    def classes(self):
        return tuple([self.wanted.shape.class_ids[i] for i in range(self.wanted.shape.classes)])

    @property
    def affinity(self):
        return tuple([self.wanted.shape.hard_ids[i] for i in range(self.wanted.shape.affinities)])

    @property
    def anti_affinity(self):
        return tuple([
            self.wanted.shape.hard_ids[i] for i in range(self.wanted.shape.affinities, self.wanted.shape.hards)
        ])

    @property
    def adds(self):
        return tuple([self.wanted.add_ids[i] for i in range(self.wanted.adds)])

    @property
    def preferences(self):
        return tuple([
            (self.wanted.shape.preference_ids[i], self.wanted.shape.preference_weights[i])
            for i in range(self.wanted.shape.preferences)
        ])

    @property
    def prefer(self):
        return self.soft(SOFT_PREFER)

    @property
    def avoid(self):
        return self.soft(SOFT_AVOID)

    @property
    def spread(self):
        return self.soft(SOFT_SPREAD)
