/* The limit of taking output from a pty: a blocking read loop while a child writes. Usage: pty_read MEGABYTES. Prints
 * bytes per CPU-second of the reader, then bytes per second. */
#define _GNU_SOURCE
#include <pty.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static char data[65536];

int main(int argc, char **argv)
{
    size_t left = (size_t)(argc > 1 ? atoi(argv[1]) : 64) << 20, total = left;
    int master, slave;
    struct termios raw;
    struct rusage use;
    struct timespec begin, end;
    if (openpty(&master, &slave, NULL, NULL, NULL) != 0)
        return 1;
    tcgetattr(slave, &raw);
    cfmakeraw(&raw);
    tcsetattr(slave, TCSANOW, &raw);
    pid_t child = fork();
    if (child == 0) {
        memset(data, 'x', sizeof data);
        for (size_t sent = 0; sent < total;) {
            ssize_t size = write(slave, data, sizeof data);
            if (size <= 0)
                _exit(1);
            sent += size;
        }
        _exit(0);
    }
    clock_gettime(CLOCK_MONOTONIC, &begin);
    while (left > 0) {
        ssize_t size = read(master, data, sizeof data);
        if (size <= 0)
            return 1;
        left -= size;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    waitpid(child, NULL, 0);
    getrusage(RUSAGE_SELF, &use);
    printf("%f %f\n",
           (double)total / (use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6),
           (double)total / (end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) / 1e9));
    return 0;
}
