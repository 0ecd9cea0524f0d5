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
