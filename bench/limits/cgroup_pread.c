// The limit of sampling: descriptors kept open, one pread and the least of parsing a file, nothing kept.
//   cgroup_pread GROUP COUNT ROUNDS
// reads four files (cpuacct, memory, pids, blkio) of /sys/fs/cgroup/*/GROUP/i0 .. i(COUNT-1), ROUNDS times over, and
// prints the processor time of that in nanoseconds, and the sum of all numbers read (so that none is left out).
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static const char *const FILES[] = {"cpuacct/%s/i%d/cpuacct.usage", "memory/%s/i%d/memory.usage_in_bytes",
                                    "pids/%s/i%d/pids.current", "blkio/%s/i%d/blkio.throttle.io_service_bytes"};
enum { FILE_COUNT = 4 };

static int64_t cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static uint64_t numbers(const char *text, ssize_t size) {
    uint64_t sum = 0, value = 0;
    for (ssize_t i = 0; i < size; i++) {
        if (text[i] >= '0' && text[i] <= '9') {
            value = value * 10 + (uint64_t)(text[i] - '0');
        } else {
            sum += value;
            value = 0;
        }
    }
    return sum + value;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int count = atoi(argv[2]), rounds = atoi(argv[3]);
    int *fds = malloc(sizeof(int) * FILE_COUNT * count);
    for (int i = 0; i < count; i++)
        for (int f = 0; f < FILE_COUNT; f++) {
            char name[128], path[256];
            snprintf(name, sizeof name, FILES[f], argv[1], i);
            snprintf(path, sizeof path, "/sys/fs/cgroup/%s", name);
            if ((fds[i * FILE_COUNT + f] = open(path, O_RDONLY | O_CLOEXEC)) < 0) {
                perror(path);
                return 1;
            }
        }
    static char buffer[8192];
    uint64_t sum = 0;
    int64_t begin = 0;
    for (int round = -1; round < rounds; round++) {  // one that is not counted
        if (round == 0) begin = cpu_ns();
        for (int i = 0; i < count * FILE_COUNT; i++) {
            ssize_t size = pread(fds[i], buffer, sizeof buffer, 0);
            if (size < 0) {
                perror("pread");
                return 1;
            }
            sum += numbers(buffer, size);
        }
    }
    printf("%lld %llu\n", (long long)(cpu_ns() - begin), (unsigned long long)sum);
    return 0;
}
