/* Judging a block of 64 nodes at once, without a branch a node: the loops of _table_c, as the rules in _rules.py say.
 *
 * One body in GCC's vectors of 8 int32, compiled twice: for the processor at hand (AVX2, found out at run time) and for
 * any. Both give the same numbers, as all of it is integer arithmetic that wraps (unsigned) or cannot overflow (sums of
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
    uint32_t folded_hash[BLOCK];
    int32_t load_score[BLOCK], penalty_score[BLOCK];
} hv_block;

/* What a block can offer at best; what it cannot is not looked for there. */
typedef struct {
    int32_t cpu_free, memory_free, disk_free, bits;  /* maxima, and the union of the bits */
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

static inline uint32_t hv_mix32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ x >> 16;
}

static inline uint32_t hv_fold(uint64_t x) {
    return (uint32_t)x ^ (uint32_t)(x >> 32);
}

static inline int32_t hv_permille(uint64_t sum) {
    if (sum > (uint64_t)1 << 31)
        sum = (uint64_t)1 << 31;
    return (int32_t)((uint32_t)(sum >> 11) * 1000U >> 20);
}

/* The vectors below never cross a call: all is inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"

#define HV_INLINE static inline __attribute__((always_inline))
#define HV_SPLAT(x) ((hv_vec){0} + (int32_t)(x))
#define HV_USPLAT(x) ((hv_uvec){0} + (uint32_t)(x))
#define HV_LOAD(column, at) (*(const hv_vec *)&(column)[at])
#define HV_ULOAD(column, at) (*(const hv_uvec *)&(column)[at])

HV_INLINE hv_vec hv_max(hv_vec a, hv_vec b) {
    hv_vec above = a > b;
    return (a & above) | (b & ~above);
}

HV_INLINE int32_t hv_highest(hv_vec v) {
    int32_t best = v[0];
    for (int lane = 1; lane < LANES; lane++)
        best = v[lane] > best ? v[lane] : best;
    return best;
}

/* Scores of a block into `scores`, FAILS where a node fails; returns the highest.
 * `number` is the block's: columns of the plan reach to its end, domains lie within domain_value (see _engine.pxd). */
HV_INLINE int32_t hv_judge_body(const hv_block *block, const hv_plan *plan, size_t number, int32_t *scores) {
    const hv_vec lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
    hv_vec best = HV_SPLAT(FAILS);
    for (int at = 0; at < BLOCK; at += LANES) {
        hv_vec passes = (HV_LOAD(block->cpu_free, at) >= HV_SPLAT(plan->cpu)) &
                        (HV_LOAD(block->memory_free, at) >= HV_SPLAT(plan->memory)) &
                        (HV_LOAD(block->disk_free, at) >= HV_SPLAT(plan->disk)) &
                        ((HV_LOAD(block->bits, at) & HV_SPLAT(plan->bits)) == HV_SPLAT(plan->bits));
        hv_uvec sum = HV_ULOAD(block->base, at) + HV_ULOAD(block->cpu_rate, at) * HV_USPLAT(plan->cpu) +
                      HV_ULOAD(block->memory_rate, at) * HV_USPLAT(plan->memory);
        hv_uvec share = (sum >> 11) * HV_USPLAT(1000) >> 20;
        hv_vec score = HV_SPLAT(plan->constant) + (hv_vec)share * HV_SPLAT(plan->share_weight);
        if (plan->load_weight | plan->penalty_weight)
            score += HV_LOAD(block->load_score, at) * HV_SPLAT(plan->load_weight) +
                     HV_LOAD(block->penalty_score, at) * HV_SPLAT(plan->penalty_weight);
        for (int i = 0; i < plan->classes; i++) {
            hv_vec word = HV_SPLAT((plan->class_words[i][number] >> at) & 255);
            passes &= (word & lane_bit) == lane_bit;
        }
        for (int i = 0; i < plan->columns; i++)
            score += HV_LOAD(plan->column[i], number * BLOCK + at) * HV_SPLAT(plan->column_weight[i]);
        for (int i = 0; i < plan->groups; i++) {
            const int32_t *domain = plan->domain[i] + number * BLOCK + at;
            const int32_t *value = plan->domain_value[i];
            hv_vec added = {value[domain[0]], value[domain[1]], value[domain[2]], value[domain[3]],
                            value[domain[4]], value[domain[5]], value[domain[6]], value[domain[7]]};
            passes &= added >= 0;
            score += added;
        }
        score = (score & passes) | ~passes;
        *(hv_vec *)&scores[at] = score;
        best = hv_max(best, score);
    }
    return hv_highest(best);
}

/* Smallest tie key (as signed, of mix32 ^ 2**31) among the nodes of a block that score `best`. */
HV_INLINE int32_t hv_tie_body(const hv_block *block, const int32_t *scores, int32_t best, uint32_t seed) {
    hv_vec least = HV_SPLAT(INT32_MAX);
    for (int at = 0; at < BLOCK; at += LANES) {
        hv_uvec x = HV_ULOAD(block->folded_hash, at) ^ HV_USPLAT(seed);
        x ^= x >> 16;
        x *= HV_USPLAT(0x7feb352dU);
        x ^= x >> 15;
        x *= HV_USPLAT(0x846ca68bU);
        x ^= x >> 16;
        hv_vec key = (hv_vec)(x ^ HV_USPLAT(0x80000000U));
        hv_vec equal = HV_LOAD(scores, at) == HV_SPLAT(best);
        key = (key & equal) | (HV_SPLAT(INT32_MAX) & ~equal);
        hv_vec below = key < least;
        least = (key & below) | (least & ~below);
    }
    int32_t result = least[0];
    for (int lane = 1; lane < LANES; lane++)
        result = least[lane] < result ? least[lane] : result;
    return result;
}

/* Highest of 64 numbers. */
HV_INLINE int32_t hv_peak_body(const int32_t *numbers) {
    hv_vec best = HV_LOAD(numbers, 0);
    for (int at = LANES; at < BLOCK; at += LANES)
        best = hv_max(best, HV_LOAD(numbers, at));
    return hv_highest(best);
}

typedef struct {
    int32_t (*judge)(const hv_block *, const hv_plan *, size_t, int32_t *);
    int32_t (*tie)(const hv_block *, const int32_t *, int32_t, uint32_t);
    int32_t (*peak)(const int32_t *);
} hv_kernels;

/* Work a block's summary out again. */
static inline void hv_summarise(const hv_block *block, const uint8_t *alive, hv_summary *summary) {
    hv_summary s = {.cpu_free = -1, .memory_free = -1, .disk_free = -1, .base_min = UINT32_MAX,
                    .cpu_rate_min = UINT32_MAX, .memory_rate_min = UINT32_MAX};
#define HV_RAISE(field, value) s.field = (value) > s.field ? (value) : s.field
#define HV_LOWER(field, value) s.field = (value) < s.field ? (value) : s.field
    for (int i = 0; i < BLOCK; i++) {
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

#define HV_DEFINE(suffix, attribute)                                                                                   \
    attribute static int32_t hv_judge_##suffix(const hv_block *b, const hv_plan *p, size_t n, int32_t *s) {            \
        return hv_judge_body(b, p, n, s);                                                                              \
    }                                                                                                                  \
    attribute static int32_t hv_tie_##suffix(const hv_block *b, const int32_t *s, int32_t best, uint32_t seed) {       \
        return hv_tie_body(b, s, best, seed);                                                                          \
    }                                                                                                                  \
    attribute static int32_t hv_peak_##suffix(const int32_t *n) { return hv_peak_body(n); }

HV_DEFINE(any, )
#if defined(__x86_64__)
HV_DEFINE(avx2, __attribute__((target("avx2"))))
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
