/* Judging a block of 64 nodes at once, without a branch a node: the loops of _table_c, as the rules in _rules.py say.
 *
 * One body (_kernels_body.h) in GCC's vectors of 8 int32, compiled twice: for the processor at hand (AVX2, found out at
 * run time) and for any. Both give the same numbers, as all of it is integer arithmetic that wraps (unsigned) or cannot overflow (sums of
 * at most 15 scores of 0..1000 times weights of 0..1000). Comparisons of vectors give -1 (true) or 0 a lane.
 */
#ifndef HYPERVISOR_EXT_SCORING_KERNELS_H
#define HYPERVISOR_EXT_SCORING_KERNELS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 64, LANES = 8, MAX_COLUMNS = 24, FAILS = -1 };

typedef int32_t hv_vec __attribute__((vector_size(32)));
typedef uint32_t hv_uvec __attribute__((vector_size(32)));

/* The hot columns of 64 nodes. A slot without a node has cpu_free -1, so that nothing fits. */
typedef struct {
    int32_t cpu_free[BLOCK], memory_free[BLOCK], disk_free[BLOCK], bits[BLOCK];
    /* share = base + cpu * cpu_rate + memory * memory_rate, in units of 2**-31 of the mean. */
    uint32_t base[BLOCK], cpu_rate[BLOCK], memory_rate[BLOCK];
    uint32_t tie_hash[BLOCK];  /* hv_begun */
    int32_t load_score[BLOCK], penalty_score[BLOCK];
} hv_block;

/* What a block can offer at best; what it cannot is not looked for there, and what all of its nodes have is not looked at
 * one by one. The minima are of all 64 slots (-1 where one has no node), everything else of the nodes. */
typedef struct {
    int32_t cpu_free, memory_free, disk_free, bits;  /* maxima, and the union of the bits */
    int32_t cpu_free_min, memory_free_min, disk_free_min, bits_of_all;
    uint32_t base_max, base_min, cpu_rate_max, cpu_rate_min, memory_rate_max, memory_rate_min;
    int32_t load_max, penalty_max;
    int32_t stale;
} hv_summary;

/* A request against one table, ids looked up. Lanes of a column: [slot]. */
typedef struct {
    int32_t cpu, memory, disk, bits;
    int32_t constant, share_weight;  /* the score utilisation is constant + share_weight * share */
    int32_t load_weight, penalty_weight;
    int32_t classes, columns, groups;
    const uint64_t *class_words[4];  /* a word a block, a bit a node */
    const int32_t *column[4];
    int32_t column_weight[4];
    const int32_t *domain[MAX_COLUMNS];        /* domain + 1 of each slot, 0 for none */
    const int32_t *domain_value[MAX_COLUMNS];  /* by domain + 1: what the group's counters add to the score, or FAILS */
} hv_plan;

/* tie_key of _rules.py in two parts, as the first step of its mix32 can be made for the hash and the seed alone: */
static inline uint32_t hv_begun(uint64_t x) {
    uint32_t folded = (uint32_t)x ^ (uint32_t)(x >> 32);
    return folded ^ folded >> 16;
}

static inline uint32_t hv_mixed(uint32_t x) {
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ x >> 16;
}

static inline int32_t hv_permille(uint64_t sum) {
    if (sum > (uint64_t)1 << 31)
        sum = (uint64_t)1 << 31;
    return (int32_t)((uint32_t)(sum >> 11) * 1000U >> 20);
}

typedef struct {
    int32_t (*judge)(const hv_block *, const hv_summary *, const hv_plan *, size_t, int32_t *);
    int32_t (*tie)(const hv_block *, const int32_t *, int32_t, uint32_t);
    int32_t (*peak)(const int32_t *);
} hv_kernels;

/* Work a block's summary out again. */
static inline void hv_summarise(const hv_block *block, const uint8_t *alive, hv_summary *summary) {
    hv_summary s = {.cpu_free = -1, .memory_free = -1, .disk_free = -1, .cpu_free_min = INT32_MAX,
                    .memory_free_min = INT32_MAX, .disk_free_min = INT32_MAX, .bits_of_all = -1,
                    .base_min = UINT32_MAX, .cpu_rate_min = UINT32_MAX, .memory_rate_min = UINT32_MAX};
#define HV_RAISE(field, value) s.field = (value) > s.field ? (value) : s.field
#define HV_LOWER(field, value) s.field = (value) < s.field ? (value) : s.field
    for (int i = 0; i < BLOCK; i++) {
        HV_LOWER(cpu_free_min, block->cpu_free[i]);
        HV_LOWER(memory_free_min, block->memory_free[i]);
        HV_LOWER(disk_free_min, block->disk_free[i]);
        s.bits_of_all &= block->bits[i];
        if (!alive[i])
            continue;
        HV_RAISE(cpu_free, block->cpu_free[i]);
        HV_RAISE(memory_free, block->memory_free[i]);
        HV_RAISE(disk_free, block->disk_free[i]);
        s.bits |= block->bits[i];
        HV_RAISE(base_max, block->base[i]);
        HV_LOWER(base_min, block->base[i]);
        HV_RAISE(cpu_rate_max, block->cpu_rate[i]);
        HV_LOWER(cpu_rate_min, block->cpu_rate[i]);
        HV_RAISE(memory_rate_max, block->memory_rate[i]);
        HV_LOWER(memory_rate_min, block->memory_rate[i]);
        HV_RAISE(load_max, block->load_score[i]);
        HV_RAISE(penalty_max, block->penalty_score[i]);
    }
#undef HV_RAISE
#undef HV_LOWER
    *summary = s;
}

/* The vectors never cross a call: all is inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"

#define HV_KERNEL(name) hv_##name##_any
#define HV_TARGET
#include "hypervisor/ext/scoring/_kernels_body.h"
#undef HV_KERNEL
#undef HV_TARGET

#if defined(__x86_64__)
#define HV_AVX2
#define HV_KERNEL(name) hv_##name##_avx2
#define HV_TARGET __attribute__((target("avx2")))
#include "hypervisor/ext/scoring/_kernels_body.h"
#undef HV_AVX2
#undef HV_KERNEL
#undef HV_TARGET
#endif

/* The kernels for this processor; those for any where `plain` is asked for. `vectors` tells which. */
static inline hv_kernels hv_choose_kernels(int plain, const char **vectors) {
#if defined(__x86_64__)
    if (!plain && __builtin_cpu_supports("avx2")) {
        *vectors = "avx2";
        return (hv_kernels){hv_judge_avx2, hv_tie_avx2, hv_peak_avx2};
    }
#endif
    *vectors = "any";
    return (hv_kernels){hv_judge_any, hv_tie_any, hv_peak_any};
}

#endif
