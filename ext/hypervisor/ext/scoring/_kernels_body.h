/* The kernels themselves; included by _kernels.h once for each kind of processor, which defines HV_KERNEL (the names),
 * HV_TARGET (an attribute) and, where there is, HV_AVX2.
 */
#ifndef HYPERVISOR_EXT_SCORING_KERNELS_BODY_H
#define HYPERVISOR_EXT_SCORING_KERNELS_BODY_H
typedef int hv_mmx __attribute__((vector_size(32)));  /* as the compiler's own functions have it */
#define HV_INLINE HV_TARGET static inline __attribute__((always_inline))
#define HV_SPLAT(x) ((hv_vec){0} + (int32_t)(x))
#define HV_USPLAT(x) ((hv_uvec){0} + (uint32_t)(x))
#define HV_LOAD(column, at) (*(const hv_vec *)&(column)[at])
#define HV_ULOAD(column, at) (*(const hv_uvec *)&(column)[at])
#define HV_SWAPPED(v, a, b, c, d, e, f, g, h) __builtin_shuffle(v, (hv_vec){a, b, c, d, e, f, g, h})
#endif

HV_INLINE hv_vec HV_KERNEL(max)(hv_vec a, hv_vec b) {
#ifdef HV_AVX2
    return (hv_vec)__builtin_ia32_pmaxsd256((hv_mmx)a, (hv_mmx)b);
#else
    hv_vec above = a > b;
    return (a & above) | (b & ~above);
#endif
}

HV_INLINE hv_uvec HV_KERNEL(umax)(hv_uvec a, hv_uvec b) {
#ifdef HV_AVX2
    return (hv_uvec)__builtin_ia32_pmaxud256((hv_mmx)a, (hv_mmx)b);
#else
    hv_uvec above = (hv_uvec)(a > b);
    return (a & above) | (b & ~above);
#endif
}

/* GCC makes shifts and sums of a known factor: more work, where there is an instruction for the product. */
HV_INLINE hv_uvec HV_KERNEL(times_1000)(hv_uvec a) {
    hv_uvec thousand = HV_USPLAT(1000);
#ifdef HV_AVX2
    __asm__("" : "+x"(thousand));
#endif
    return a * thousand;
}

HV_INLINE int32_t HV_KERNEL(highest)(hv_vec v) {
    v = HV_KERNEL(max)(v, HV_SWAPPED(v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = HV_KERNEL(max)(v, HV_SWAPPED(v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = HV_KERNEL(max)(v, HV_SWAPPED(v, 1, 0, 3, 2, 5, 4, 7, 6));
    return v[0];
}

HV_INLINE int HV_KERNEL(any)(hv_vec v) {
    typedef int64_t quads __attribute__((vector_size(32)));
    quads q = (quads)v;
    return ((q[0] | q[1]) | (q[2] | q[3])) != 0;
}

/* Scores of a block into `scores`, FAILS where a node fails; returns the highest.
 * `number` is the block's: columns of the plan reach to its end, domains lie within domain_value (see _engine.pxd).
 * The last three are constants of the caller, one loop is made for each of their values: `check` whether there may be
 * nodes without the resources or bits; `alike` whether the nodes' rates are the same, so that the request takes the same
 * share of each; `simple` whether the plan has nothing but resources, bits and utilisation.
 * FAILS has all bits set, as has a lane that fails. What is the same for all nodes is read once: for all that the
 * compiler knows `scores` may overlap with it. */
HV_INLINE int32_t HV_KERNEL(judge_block)(const hv_block *block, const hv_summary *summary, const hv_plan *plan,
                                         size_t number, int32_t *scores, const int check, const int alike,
                                         const int simple) {
    const hv_vec lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
    const hv_vec cpu = HV_SPLAT(plan->cpu), memory = HV_SPLAT(plan->memory), disk = HV_SPLAT(plan->disk);
    const hv_vec bits = HV_SPLAT(plan->bits), constant = HV_SPLAT(plan->constant);
    const hv_vec share_weight = HV_SPLAT(plan->share_weight);
    const hv_uvec added_share = HV_USPLAT(summary->cpu_rate_max * (uint32_t)plan->cpu +
                                          summary->memory_rate_max * (uint32_t)plan->memory);
    hv_vec failing[BLOCK / LANES], best = HV_SPLAT(FAILS);
    uint64_t members = ~(uint64_t)0;
    if (!simple)
        for (int i = 0; i < plan->classes; i++)
            members &= plan->class_words[i][number];
    if (check) {
        /* In many blocks all fail. */
        hv_vec all = HV_SPLAT(-1);
#pragma GCC unroll 8
        for (int part = 0, at = 0; at < BLOCK; part++, at += LANES) {
            failing[part] = (cpu > HV_LOAD(block->cpu_free, at)) | (memory > HV_LOAD(block->memory_free, at)) |
                            (disk > HV_LOAD(block->disk_free, at)) | ((bits & ~HV_LOAD(block->bits, at)) > 0);
            all &= failing[part];
        }
        if (!HV_KERNEL(any)(~all)) {
            memset(scores, 0xFF, BLOCK * sizeof *scores);
            return FAILS;
        }
    }
#pragma GCC unroll 8
    for (int part = 0, at = 0; at < BLOCK; part++, at += LANES) {
        hv_vec fails = check ? failing[part] : HV_SPLAT(0);
        hv_uvec sum = HV_ULOAD(block->base, at);
        if (alike)
            sum += added_share;
        else
            sum += HV_ULOAD(block->cpu_rate, at) * (hv_uvec)cpu + HV_ULOAD(block->memory_rate, at) * (hv_uvec)memory;
        hv_uvec share = HV_KERNEL(times_1000)(sum >> 11) >> 20;
        hv_vec score = constant + (hv_vec)share * share_weight;
        if (!simple) {
            score += HV_LOAD(block->load_score, at) * HV_SPLAT(plan->load_weight) +
                     HV_LOAD(block->penalty_score, at) * HV_SPLAT(plan->penalty_weight);
            fails |= (HV_SPLAT((members >> at) & 255) & lane_bit) == 0;
            for (int i = 0; i < plan->columns; i++)
                score += HV_LOAD(plan->column[i], number * BLOCK + at) * HV_SPLAT(plan->column_weight[i]);
            for (int i = 0; i < plan->groups; i++) {
                const int32_t *domain = plan->domain[i] + number * BLOCK + at;
                const int32_t *value = plan->domain_value[i];
                hv_vec added = {value[domain[0]], value[domain[1]], value[domain[2]], value[domain[3]],
                                value[domain[4]], value[domain[5]], value[domain[6]], value[domain[7]]};
                fails |= added < 0;
                score += added;
            }
        }
        score |= fails;
        *(hv_vec *)&scores[at] = score;
        best = HV_KERNEL(max)(best, score);
    }
    return HV_KERNEL(highest)(best);
}

HV_TARGET static int32_t HV_KERNEL(judge)(const hv_block *block, const hv_summary *summary, const hv_plan *plan,
                                          size_t number, int32_t *scores) {
    const int check = plan->cpu > summary->cpu_free_min || plan->memory > summary->memory_free_min ||
                      plan->disk > summary->disk_free_min || (plan->bits & ~summary->bits_of_all);
    const int alike =
        summary->cpu_rate_min == summary->cpu_rate_max && summary->memory_rate_min == summary->memory_rate_max;
    const int simple = !(plan->load_weight | plan->penalty_weight | plan->classes | plan->columns | plan->groups);
#define HV_JUDGED(check, alike, simple) \
    HV_KERNEL(judge_block)(block, summary, plan, number, scores, check, alike, simple)
    if (!simple)
        return alike ? HV_JUDGED(1, 1, 0) : HV_JUDGED(1, 0, 0);
    if (!check && alike)
        return HV_JUDGED(0, 1, 1);
    return alike ? HV_JUDGED(1, 1, 1) : HV_JUDGED(1, 0, 1);
#undef HV_JUDGED
}

/* Smallest tie key (as signed, of the key ^ 2**31) among the nodes of a block that score `best`; one does.
 * The largest complement is looked for, unsigned: 0 of those that score something else. `seed` and tie_hash are
 * hv_begun. */
HV_TARGET static int32_t HV_KERNEL(tie)(const hv_block *block, const int32_t *scores, int32_t best, uint32_t seed) {
    hv_uvec most = HV_USPLAT(0);
#pragma GCC unroll 8
    for (int at = 0; at < BLOCK; at += LANES) {
        hv_uvec x = HV_ULOAD(block->tie_hash, at) ^ HV_USPLAT(seed);
        x *= HV_USPLAT(0x7feb352dU);
        x ^= x >> 15;
        x *= HV_USPLAT(0x846ca68bU);
        x ^= x >> 16;
        x = ~x & (hv_uvec)(HV_LOAD(scores, at) == HV_SPLAT(best));
        most = HV_KERNEL(umax)(most, x);
    }
    /* In the order of signed numbers from here on. */
    return ~HV_KERNEL(highest)((hv_vec)(most ^ HV_USPLAT(0x80000000U)));
}

/* Highest of 64 numbers. */
HV_TARGET static int32_t HV_KERNEL(peak)(const int32_t *numbers) {
    hv_vec best = HV_LOAD(numbers, 0);
    for (int at = LANES; at < BLOCK; at += LANES)
        best = HV_KERNEL(max)(best, HV_LOAD(numbers, at));
    return HV_KERNEL(highest)(best);
}

