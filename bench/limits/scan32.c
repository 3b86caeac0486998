/* The limit of an exact choice by scan: five int32 columns, one pass without branches, then the best one's place.
 *
 * scan32 NODES PICKS prints picks a second. Each pick is also reserved. Compile with -O3 -march=native.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static uint64_t state = 88172645463325252ULL;

static uint32_t draw(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16) % below;
}

/* Scores into `score`; returns the highest, -1 where nothing fits. `n` is a multiple of 64. */
__attribute__((noinline)) static int32_t scan(const int32_t *restrict cpu, const int32_t *restrict memory,
                                              const int32_t *restrict disk, const int32_t *restrict bits,
                                              const int32_t *restrict weight, int32_t c, int32_t m, int32_t d,
                                              int32_t need, int n, int *where) {
    enum { PART = 1024 };
    int32_t best = -1;
    int part = 0;
    for (int from = 0; from < n; from += PART) {
        int to = from + PART < n ? from + PART : n;
        int32_t highest = -1;
        for (int i = from; i < to; i++) {
            int32_t fits = (cpu[i] >= c) & (memory[i] >= m) & (disk[i] >= d) & ((bits[i] & need) == need);
            int32_t score = (cpu[i] << 2) + (memory[i] >> 2) + (disk[i] >> 4) + weight[i];
            score = fits ? score : -1;
            highest = score > highest ? score : highest;
        }
        if (highest > best) {
            best = highest;
            part = from;
        }
    }
    for (int i = part; best >= 0 && i < n; i++)
        if (cpu[i] >= c && memory[i] >= m && disk[i] >= d && (bits[i] & need) == need &&
            (cpu[i] << 2) + (memory[i] >> 2) + (disk[i] >> 4) + weight[i] == best) {
            *where = i;
            break;
        }
    return best;
}

int main(int argc, char **argv) {
    int nodes = argc > 1 ? atoi(argv[1]) : 10000, picks = argc > 2 ? atoi(argv[2]) : 20000;
    int n = (nodes + 63) / 64 * 64, placed = 0;
    int32_t *column[5];
    for (int j = 0; j < 5; j++)
        if (!(column[j] = aligned_alloc(64, (size_t)n * 4)))
            return 1;
    for (int i = 0; i < n; i++) {
        column[0][i] = i < nodes ? (int32_t)draw(64000) : -1;
        column[1][i] = (int32_t)draw(262144);
        column[2][i] = (int32_t)draw(4000);
        column[3][i] = (int32_t)draw(65536);
        column[4][i] = (int32_t)draw(1000);
    }
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    for (int i = 0; i < picks; i++) {
        int where = -1;
        if (scan(column[0], column[1], column[2], column[3], column[4], 1000 + i % 1024, 2048 + i % 511, 10,
                 i & 1 ? 1 << (i % 16) : 0, n, &where) >= 0) {
            column[0][where] -= 1;
            placed++;
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &after);
    if (placed != picks)
        return 2;
    printf("%.1f\n", picks / ((double)(after.tv_sec - before.tv_sec) + (double)(after.tv_nsec - before.tv_nsec) / 1e9));
    return 0;
}
