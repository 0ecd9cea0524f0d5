#include "pump_common.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum {
    SPURIOUS_PER_WINDOW = 1000,
    WINDOW_NS = 1000000000,
    MUTE_NS = 10000000,
};

uint64_t pump_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int pump_ms_until(uint64_t until_ns, int most_ms)
{
    uint64_t now_ns = pump_now_ns();
    uint64_t left_ms = until_ns > now_ns ? (until_ns - now_ns + 999999) / 1000000 : 0;

    return left_ms < (uint64_t)most_ms ? (int)left_ms : most_ms;
}

int pump_watch(int epoll_fd, int fd, uint32_t events, uint64_t key)
{
    struct epoll_event event = {.events = events, .data.u64 = key};

    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0 ? 0 : -errno;
}

void pump_unwatch(int epoll_fd, int fd)
{
    (void)epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

int pump_bell_open(struct pump_bell *bell)
{
    atomic_init(&bell->stop, 0);
    atomic_init(&bell->cancel, 0);
    atomic_init(&bell->heard, 0);
    bell->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return bell->fd >= 0 ? 0 : -errno;
}

void pump_bell_ring(struct pump_bell *bell)
{
    uint64_t one = 1;

    /* Can fail only where the counter is full, and then it is ringing. */
    if (write(bell->fd, &one, sizeof(one)) < 0) {
        return;
    }
}

void pump_bell_silence(struct pump_bell *bell)
{
    uint64_t count;

    if (read(bell->fd, &count, sizeof(count)) < 0) {
        return; /* it was silent */
    }
    pump_count(&bell->heard, 1);
}

uint64_t pump_bell_ping(struct pump_bell *bell)
{
    uint64_t heard = atomic_load_explicit(&bell->heard, memory_order_relaxed);

    pump_bell_ring(bell);
    return heard;
}

int pump_line_open(struct pump_line *line, struct xen_channel *channel, int epoll_fd, uint64_t key)
{
    memset(line, 0, sizeof(*line));
    line->channel = channel;
    /* Edges: an event that was pending before is reported once by the addition itself. */
    return pump_watch(epoll_fd, channel->fd, EPOLLIN | EPOLLET, key);
}

void pump_line_close(struct pump_line *line, int epoll_fd)
{
    if (line->channel) {
        pump_unwatch(epoll_fd, line->channel->fd);
        line->channel = NULL;
    }
}

int pump_line_event(struct pump_line *line)
{
    line->rearm_due = true;
    return xen_take(line->channel);
}

static void set_events(struct pump_line *line, int epoll_fd, uint64_t key, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u64 = key};

    (void)epoll_ctl(epoll_fd, EPOLL_CTL_MOD, line->channel->fd, &event);
}

int pump_line_done(struct pump_line *line, bool spurious, int epoll_fd, uint64_t key)
{
    if (!line->rearm_due) {
        return 0;
    }
    if (spurious && ++line->window_events > SPURIOUS_PER_WINDOW) {
        uint64_t now_ns = pump_now_ns();

        line->window_events = 0;
        if (now_ns - line->window_start_ns < WINDOW_NS) {
            line->muted_until_ns = now_ns + MUTE_NS;
            set_events(line, epoll_fd, key, 0);
            return 0;
        }
        line->window_start_ns = now_ns;
    }
    line->rearm_due = false;
    return xen_rearm(line->channel);
}

int pump_line_unmute(struct pump_line *line, int epoll_fd, uint64_t key)
{
    if (!line->muted_until_ns || pump_now_ns() < line->muted_until_ns) {
        return 0;
    }
    line->muted_until_ns = 0;
    line->rearm_due = false;
    set_events(line, epoll_fd, key, EPOLLIN | EPOLLET);
    return xen_rearm(line->channel);
}

bool pump_has_tag(const uint16_t *tags, uint32_t count, uint16_t tag)
{
    for (uint32_t i = 0; i < count; i++) {
        if (tags[i] == tag) {
            return true;
        }
    }
    return false;
}

int pump_find(const uint32_t *table, uint32_t count, uint32_t ordinal)
{
    uint32_t low = 0, high = count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (table[middle] < ordinal) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && table[low] == ordinal ? (int)low : -1;
}

int pump_deadlines_set(struct pump_deadlines *deadlines, uint32_t default_ms,
                       const uint32_t *ordinals, const uint32_t *ms, uint32_t count)
{
    if (count > PUMP_TABLE_MAX) {
        return -E2BIG;
    }
    deadlines->default_ms = default_ms;
    memcpy(deadlines->ordinals, ordinals, count * sizeof(*ordinals));
    memcpy(deadlines->ms, ms, count * sizeof(*ms));
    deadlines->count = count;
    return 0;
}

uint32_t pump_deadline_ms(const struct pump_deadlines *deadlines, uint32_t ordinal)
{
    int at = pump_find(deadlines->ordinals, deadlines->count, ordinal);

    return at < 0 ? deadlines->default_ms : deadlines->ms[at];
}
