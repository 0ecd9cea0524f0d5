/* What the C tests share: CHECK, and a Xen whose two ends are in this process. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "xen_ops.h"

/* Not assert(): a release build drops that. */
#define CHECK(condition)                                                               \
    do {                                                                               \
        if (!(condition)) {                                                            \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition); \
            abort();                                                                   \
        }                                                                              \
    } while (0)

static inline int loopback_notify(struct xen_channel *channel)
{
    uint64_t one = 1;

    return write(channel->notify_fd, &one, sizeof(one)) < 0 && errno != EAGAIN ? -errno : 0;
}

static inline int loopback_quiet(struct xen_channel *channel)
{
    (void)channel;
    return 0;
}

static const struct xen_ops loopback_ops = {
    .notify = loopback_notify,
    .take = loopback_quiet,
    .rearm = loopback_quiet,
};

static struct xen loopback = {.ops = &loopback_ops};

/* A page and a channel, as its two ends see them. */
struct ring {
    struct xen_page page;
    struct xen_channel frontend, backend;
};

static inline struct ring ring_open(void)
{
    struct ring ring = {0};
    int to_frontend = eventfd(0, EFD_NONBLOCK), to_backend = eventfd(0, EFD_NONBLOCK);

    ring.page.shared = mmap(NULL, TPMIF_PAGE_BYTES, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(ring.page.shared != MAP_FAILED);
    ring.frontend =
        (struct xen_channel){.xen = &loopback, .fd = to_frontend, .notify_fd = to_backend};
    ring.backend =
        (struct xen_channel){.xen = &loopback, .fd = to_backend, .notify_fd = to_frontend};
    return ring;
}

static inline void ring_close(struct ring *ring)
{
    munmap(ring->page.shared, TPMIF_PAGE_BYTES);
    close(ring->frontend.fd);
    close(ring->backend.fd);
}

/* A TPM header of the family 2.0. */
static inline void header(uint8_t *to, uint16_t tag, uint32_t bytes, uint32_t code)
{
    const uint8_t raw[10] = {
        (uint8_t)(tag >> 8),    (uint8_t)tag,         (uint8_t)(bytes >> 24), (uint8_t)(bytes >> 16),
        (uint8_t)(bytes >> 8),  (uint8_t)bytes,       (uint8_t)(code >> 24),  (uint8_t)(code >> 16),
        (uint8_t)(code >> 8),   (uint8_t)code,
    };

    memcpy(to, raw, sizeof(raw));
}

/* A peer that writes any field of its page at any time, and notifies as it likes. */
struct vandal {
    struct tpmif_page *page;
    struct xen_channel *channel;
    atomic_bool enough;
    pthread_t thread;
};

static inline void *vandalise(void *opaque)
{
    static const uint32_t lengths[] = {0, 9, 10, 12, 4088, 4089, UINT32_MAX};
    struct vandal *vandal = opaque;
    struct tpmif_page *page = vandal->page;
    uint32_t seed = 7;
    uint8_t head[12];

    header(head, 0x8001, 12, 0x17e);
    while (!atomic_load_explicit(&vandal->enough, memory_order_relaxed)) {
        seed = seed * 1664525 + 1013904223;
        for (size_t at = 0; at < sizeof(head) / 4; at++) {
            uint32_t word;

            memcpy(&word, head + 4 * at, 4);
            word = seed >> 29 ? word : seed; /* mostly a header that is right */
            atomic_store_explicit(&page->payload[at], word, memory_order_relaxed);
        }
        atomic_store_explicit(&page->payload[seed % 1022], seed, memory_order_relaxed);
        atomic_store_explicit(&page->length, lengths[(seed >> 8) % 7], memory_order_relaxed);
        atomic_store_explicit(&page->locality, (uint8_t)(seed >> 16), memory_order_relaxed);
        atomic_store_explicit(&page->nr_extra_pages, (uint8_t)(seed >> 27 ? 0 : seed >> 8),
                              memory_order_relaxed);
        atomic_store_explicit(&page->state, (uint8_t)((seed >> 24) % 5), memory_order_release);
        (void)xen_notify(vandal->channel);
    }
    return NULL;
}

static inline void vandal_start(struct vandal *vandal, struct tpmif_page *page,
                                struct xen_channel *channel)
{
    vandal->page = page;
    vandal->channel = channel;
    atomic_init(&vandal->enough, false);
    CHECK(pthread_create(&vandal->thread, NULL, vandalise, vandal) == 0);
}

static inline void vandal_stop(struct vandal *vandal)
{
    atomic_store(&vandal->enough, true);
    CHECK(pthread_join(vandal->thread, NULL) == 0);
}

static inline void read_all(int fd, uint8_t *to, size_t bytes)
{
    while (bytes > 0) {
        ssize_t got = read(fd, to, bytes);

        CHECK(got > 0);
        to += got;
        bytes -= (size_t)got;
    }
}

#endif
