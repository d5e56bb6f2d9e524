/*
 * A machine whose clock is wrong: with this in LD_PRELOAD, a process sees the time of day CLOCK_SHIFT seconds later.
 *
 *     gcc -shared -fPIC -Wall -Wextra -Werror clock.c -o clock.so
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int code = (int)syscall(SYS_clock_gettime, clock, now);
    const char *shift = getenv("CLOCK_SHIFT");
    if (!code && shift && clock == CLOCK_REALTIME)
        now->tv_sec += atoi(shift);
    return code;
}
