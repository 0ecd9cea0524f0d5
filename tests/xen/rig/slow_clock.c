/*
 * A clock for xl that is slow: LD_PRELOAD=slow_clock.so xl create ...
 *
 * libxl gives a stub domain 30 s until its QEMU runs, which nothing can change.  On an emulated
 * processor a stub domain may need a minute for that.  libxl's deadlines are made of
 * gettimeofday() alone, so this makes a second of theirs last SLOWNESS seconds; other programs
 * that inherit it see a wall clock that lags, and their timers are those of CLOCK_MONOTONIC.
 */
#include <sys/time.h>
#include <time.h>

enum { SLOWNESS = 20 };

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    static time_t first;
    struct timespec real;

    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &real) != 0)
        return -1;
    if (first == 0)
        first = real.tv_sec;
    long long us = (real.tv_sec - first) * 1000000LL + real.tv_nsec / 1000;
    us /= SLOWNESS;
    now->tv_sec = first + us / 1000000;
    now->tv_usec = us % 1000000;
    return 0;
}
