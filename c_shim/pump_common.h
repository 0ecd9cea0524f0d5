/* What the two pumps share: their poll set, event channels in it, time and sockets. */
#ifndef PUMP_COMMON_H
#define PUMP_COMMON_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "xen_ops.h"

enum {
    TPM_HEADER_BYTES = 10, /* tag, size, ordinal or response code; big-endian */
    PUMP_TABLE_MAX = 128,
    PUMP_TAGS_MAX = 8,
    /* Commands are counted by ordinal up to here, which is past both families' last; others
       share one counter behind these. */
    PUMP_ORDINALS = 0x200,
};

/* Who asks a running pump to stop. */
enum pump_stop {
    PUMP_STOP_DRAIN = 1, /* after the command in flight */
    PUMP_STOP_NOW = 2,
};

struct tpm_header {
    uint16_t tag;
    uint32_t bytes;
    uint32_t code;
};

static inline struct tpm_header tpm_header_load(const uint8_t *b)
{
    return (struct tpm_header){
        .tag = (uint16_t)(b[0] << 8 | b[1]),
        .bytes = (uint32_t)b[2] << 24 | (uint32_t)b[3] << 16 | (uint32_t)b[4] << 8 | b[5],
        .code = (uint32_t)b[6] << 24 | (uint32_t)b[7] << 16 | (uint32_t)b[8] << 8 | b[9],
    };
}

uint64_t pump_now_ns(void);

/* Milliseconds from now to `until_ns`, rounded up, 0 where it has passed, at most `most_ms`. */
int pump_ms_until(uint64_t until_ns, int most_ms);

/* A descriptor in a poll set; `key` comes back with its events. */
int pump_watch(int epoll_fd, int fd, uint32_t events, uint64_t key);
void pump_unwatch(int epoll_fd, int fd);

/* The wake-up that other threads use, and what they ask for with it. */
struct pump_bell {
    int fd;
    atomic_uint stop;
    atomic_uint cancel;
    _Atomic uint64_t heard; /* how often the pump came to the door */
};

int pump_bell_open(struct pump_bell *bell);
void pump_bell_ring(struct pump_bell *bell);
void pump_bell_silence(struct pump_bell *bell);
/* Ring, and return how often the bell was heard: who gets the same number twice rang for a
   pump that has not looked since, because it does not run or because it is stuck. */
uint64_t pump_bell_ping(struct pump_bell *bell);

/*
 * An event channel in a poll set.  A peer may notify without end; past a limit its
 * channel is muted for a while, which costs that peer alone.
 */
struct pump_line {
    struct xen_channel *channel; /* NULL: none */
    uint64_t window_start_ns;
    uint64_t muted_until_ns; /* 0: not muted */
    uint32_t window_events;
    bool rearm_due;
};

int pump_line_open(struct pump_line *line, struct xen_channel *channel, int epoll_fd, uint64_t key);
void pump_line_close(struct pump_line *line, int epoll_fd);
/* An event came: take it.  `spurious` says that it told nothing new. */
int pump_line_event(struct pump_line *line);
/* After the page was looked at: allow the next event, or mute a line that cries wolf. */
int pump_line_done(struct pump_line *line, bool spurious, int epoll_fd, uint64_t key);
/* Unmute once the time has come. */
int pump_line_unmute(struct pump_line *line, int epoll_fd, uint64_t key);

/* Membership in a short list, and in a sorted one. */
bool pump_has_tag(const uint16_t *tags, uint32_t count, uint16_t tag);
/* Index of `ordinal` in the ascending `table`, or -1. */
int pump_find(const uint32_t *table, uint32_t count, uint32_t ordinal);

/* How long each ordinal may take. */
struct pump_deadlines {
    uint32_t default_ms; /* of an ordinal that the table does not name */
    uint32_t ordinals[PUMP_TABLE_MAX], ms[PUMP_TABLE_MAX], count;
};

/* `ordinals` ascend.  Returns 0 or -E2BIG. */
int pump_deadlines_set(struct pump_deadlines *deadlines, uint32_t default_ms,
                       const uint32_t *ordinals, const uint32_t *ms, uint32_t count);
uint32_t pump_deadline_ms(const struct pump_deadlines *deadlines, uint32_t ordinal);

/* Counters are written by the pump alone and read by anyone. */
static inline void pump_count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by,
                          memory_order_relaxed);
}

#endif
