/* The limit of handing one output to many: writev of 64 KiB in two pieces from memory to V unix stream sockets that a
 * child drains. Usage: fanout VIEWERS MEGABYTES_PER_VIEWER. Prints bytes delivered per CPU-second of the sender. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static char piece[65536], sink[1 << 18];

static void drain(int (*pairs)[2], int viewers, size_t each)
{
    int set = epoll_create1(0), open_ones = viewers;
    size_t *seen = calloc(viewers, sizeof *seen);
    for (int i = 0; i < viewers; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};
        close(pairs[i][0]);
        epoll_ctl(set, EPOLL_CTL_ADD, pairs[i][1], &event);
    }
    while (open_ones > 0) {
        struct epoll_event events[128];
        int count = epoll_wait(set, events, 128, -1);
        for (int k = 0; k < count; k++) {
            int i = events[k].data.u32;
            ssize_t size = read(pairs[i][1], sink, sizeof sink);
            if (size <= 0)
                _exit(1);
            seen[i] += size;
            if (seen[i] == each) {
                open_ones--;
                epoll_ctl(set, EPOLL_CTL_DEL, pairs[i][1], NULL);
            }
        }
    }
    _exit(0);
}

int main(int argc, char **argv)
{
    int viewers = argc > 1 ? atoi(argv[1]) : 10, status;
    size_t each = (size_t)(argc > 2 ? atoi(argv[2]) : 64) << 20;
    int (*pairs)[2] = calloc(viewers, sizeof *pairs);
    struct rusage use;
    for (int i = 0; i < viewers; i++)
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, pairs[i]) != 0)
            return 1;
    pid_t child = fork();
    if (child == 0)
        drain(pairs, viewers, each);
    for (size_t sent = 0; sent < each; sent += sizeof piece)
        for (int i = 0; i < viewers; i++) {
            struct iovec two[2] = {{piece, 32768}, {piece + 32768, 32768}};
            if (writev(pairs[i][0], two, 2) != sizeof piece)
                return 1;
        }
    waitpid(child, &status, 0);
    if (status != 0)
        return 1;
    getrusage(RUSAGE_SELF, &use);
    printf("%f\n", (double)each * viewers /
                       (use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6));
    return 0;
}
