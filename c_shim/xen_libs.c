/*
 * Xen's grants and event channels through libxengnttab and libxenevtchn, opened with
 * dlopen: the same build runs on a machine that has neither.
 *
 * Each channel has an event channel handle of its own, so that two pumps never read the
 * same descriptor.  A process that is about to lose the right to open the devices opens
 * handles in advance (xen_keep); a channel that is closed then gives its handle back.
 * Pages are shared with an unmap notification on the state byte: when this process dies,
 * the kernel zeroes it, and a request that the backend has not yet fetched is withdrawn.
 *
 * Source: Xen's public headers xengnttab.h and xenevtchn.h (both libraries keep their
 * interface at SONAME .1); tests/xen_headers.c compares the types used here with them.
 */
#include "xen_ops.h"

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "xen_libs.h"

static struct xen_libs libs;
static pthread_mutex_t libs_lock = PTHREAD_MUTEX_INITIALIZER;

int xen_libs_load(const char *library, const struct xen_symbol *symbols, size_t count,
                  const char **missing)
{
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);

    if (!handle) {
        *missing = library;
        return -ENOENT;
    }
    for (size_t i = 0; i < count; i++) {
        *symbols[i].function = dlsym(handle, symbols[i].name);
        if (!*symbols[i].function) {
            *missing = symbols[i].name;
            return -ENOSYS;
        }
    }
    return 0;
}

#define WANT(name) {#name, (void **)&libs.name}

static int load_libs(const char **missing)
{
    const struct xen_symbol grants[] = {
        WANT(xengntshr_open),         WANT(xengntshr_close),        WANT(xengntshr_unshare),
        WANT(xengntshr_share_page_notify), WANT(xengnttab_open),    WANT(xengnttab_close),
        WANT(xengnttab_map_grant_ref), WANT(xengnttab_unmap),
    };
    const struct xen_symbol events[] = {
        WANT(xenevtchn_open),    WANT(xenevtchn_close),  WANT(xenevtchn_fd),
        WANT(xenevtchn_pending), WANT(xenevtchn_unmask), WANT(xenevtchn_notify),
        WANT(xenevtchn_bind_unbound_port), WANT(xenevtchn_bind_interdomain),
        WANT(xenevtchn_unbind),
    };
    int status;

    pthread_mutex_lock(&libs_lock);
    status = xen_libs_load("libxengnttab.so.1", grants, sizeof(grants) / sizeof(grants[0]),
                           missing);
    if (status == 0) {
        status = xen_libs_load("libxenevtchn.so.1", events, sizeof(events) / sizeof(events[0]),
                               missing);
    }
    pthread_mutex_unlock(&libs_lock);
    return status;
}

/* What a library that returned NULL or -1 left in errno; never 0. */
static int failure(void)
{
    return errno ? -errno : -EIO;
}

static void libs_close(struct xen *xen)
{
    while (xen->spares_count > 0) {
        libs.xenevtchn_close(xen->spares[--xen->spares_count]);
    }
    if (xen->gntshr) {
        libs.xengntshr_close(xen->gntshr);
    }
    if (xen->gnttab) {
        libs.xengnttab_close(xen->gnttab);
    }
}

/* The two grant devices are opened when first used: a bridge shares, a vTPM domain maps. */
static int opened(struct xen *xen, void **handle, void *(*open)(void *, unsigned))
{
    int status = 0;

    pthread_mutex_lock(&xen->lock);
    if (!*handle) {
        errno = 0;
        *handle = open(NULL, 0);
        status = *handle ? 0 : failure();
    }
    pthread_mutex_unlock(&xen->lock);
    return status;
}

static int libs_share_page(struct xen *xen, uint32_t domid, struct xen_page *page)
{
    int status = opened(xen, &xen->gntshr, libs.xengntshr_open);

    if (status == 0) {
        errno = 0;
        page->shared = libs.xengntshr_share_page_notify(
            xen->gntshr, domid, &page->ref, 1, offsetof(struct tpmif_page, state), UINT32_MAX);
        status = page->shared ? 0 : failure();
    }
    if (status == 0) {
        memset((void *)page->shared, 0, TPMIF_PAGE_BYTES);
    }
    return status;
}

static int libs_map_page(struct xen *xen, uint32_t domid, uint32_t ref, struct xen_page *page)
{
    int status = opened(xen, &xen->gnttab, libs.xengnttab_open);

    if (status == 0) {
        errno = 0;
        page->shared =
            libs.xengnttab_map_grant_ref(xen->gnttab, domid, ref, PROT_READ | PROT_WRITE);
        status = page->shared ? 0 : failure();
    }
    return status;
}

static void libs_drop_page(struct xen_page *page)
{
    if (page->granted) {
        (void)libs.xengntshr_unshare(page->xen->gntshr, page->shared, 1);
    } else {
        (void)libs.xengnttab_unmap(page->xen->gnttab, page->shared, 1);
    }
}

/* A handle that was kept open, or NULL. */
static void *take_spare(struct xen *xen)
{
    void *handle = NULL;

    pthread_mutex_lock(&xen->lock);
    if (xen->spares_count > 0) {
        handle = xen->spares[--xen->spares_count];
    }
    pthread_mutex_unlock(&xen->lock);
    return handle;
}

/* Keep a handle that has no port any more, or close it where enough are kept. */
static void give_back(struct xen *xen, void *handle)
{
    pthread_mutex_lock(&xen->lock);
    if (xen->spares_count < xen->spares_kept) {
        xen->spares[xen->spares_count++] = handle;
        handle = NULL;
    }
    pthread_mutex_unlock(&xen->lock);
    if (handle) {
        libs.xenevtchn_close(handle);
    }
}

static int open_events(struct xen *xen, struct xen_channel *channel)
{
    channel->handle = take_spare(xen);
    if (channel->handle) {
        return 0;
    }
    errno = 0;
    channel->handle = libs.xenevtchn_open(NULL, 0);
    return channel->handle ? 0 : failure();
}

/* Take pending events; the kernel's device blocks a read without one, so ask first. */
static int take_events(void *handle)
{
    struct pollfd event = {.fd = libs.xenevtchn_fd(handle), .events = POLLIN};

    if (poll(&event, 1, 0) <= 0) {
        return 0;
    }
    errno = 0;
    return libs.xenevtchn_pending(handle) < 0 ? failure() : 1;
}

static int bound(struct xen *xen, struct xen_channel *channel, int port)
{
    if (port < 0) {
        int status = failure();

        give_back(xen, channel->handle);
        return status;
    }
    channel->port = (uint32_t)port;
    channel->fd = libs.xenevtchn_fd(channel->handle);
    return 0;
}

static int libs_alloc_unbound(struct xen *xen, uint32_t domid, struct xen_channel *channel)
{
    int status = open_events(xen, channel);

    return status ? status
                  : bound(xen, channel, libs.xenevtchn_bind_unbound_port(channel->handle, domid));
}

static int libs_bind_interdomain(struct xen *xen, uint32_t domid, uint32_t port,
                                 struct xen_channel *channel)
{
    int status = open_events(xen, channel);

    return status ? status
                  : bound(xen, channel,
                          libs.xenevtchn_bind_interdomain(channel->handle, domid, port));
}

static void libs_close_channel(struct xen_channel *channel)
{
    int taken;

    if (channel->xen->spares_kept == 0 ||
        libs.xenevtchn_unbind(channel->handle, channel->port) != 0) {
        libs.xenevtchn_close(channel->handle);
        return;
    }
    /* What the old port left behind would count as the next one's. */
    do {
        taken = take_events(channel->handle);
    } while (taken > 0);
    give_back(channel->xen, channel->handle);
}

/* One more handle in store. */
static int keep_events(struct xen *xen)
{
    void *handle;

    errno = 0;
    handle = libs.xenevtchn_open(NULL, 0);
    if (!handle) {
        return failure();
    }
    xen->spares[xen->spares_count++] = handle;
    xen->spares_kept++;
    return 0;
}

static int libs_keep(struct xen *xen, enum xen_role role, unsigned channels)
{
    int status = role == XEN_SHARES ? opened(xen, &xen->gntshr, libs.xengntshr_open)
                                    : opened(xen, &xen->gnttab, libs.xengnttab_open);

    while (status == 0 && xen->spares_kept < channels) {
        status = keep_events(xen);
    }
    return status;
}

static int libs_notify(struct xen_channel *channel)
{
    return libs.xenevtchn_notify(channel->handle, channel->port) < 0 ? failure() : 0;
}

static int libs_take(struct xen_channel *channel)
{
    int taken = take_events(channel->handle);

    return taken < 0 ? taken : 0;
}

static int libs_rearm(struct xen_channel *channel)
{
    return libs.xenevtchn_unmask(channel->handle, channel->port) < 0 ? failure() : 0;
}

static const struct xen_ops libs_ops = {
    .close = libs_close,
    .keep = libs_keep,
    .share_page = libs_share_page,
    .map_page = libs_map_page,
    .drop_page = libs_drop_page,
    .alloc_unbound = libs_alloc_unbound,
    .bind_interdomain = libs_bind_interdomain,
    .close_channel = libs_close_channel,
    .notify = libs_notify,
    .take = libs_take,
    .rearm = libs_rearm,
};

int xen_open_libs(struct xen *xen, const char **missing)
{
    void *probe;
    int status;

    memset(xen, 0, sizeof(*xen));
    status = load_libs(missing);
    if (status != 0) {
        return status;
    }
    /* Opening the event channel device is what tells a Xen host from one that is not. */
    errno = 0;
    probe = libs.xenevtchn_open(NULL, 0);
    if (!probe) {
        *missing = "/dev/xen/evtchn";
        return failure();
    }
    libs.xenevtchn_close(probe);
    xen->own_domid = UINT32_MAX;
    xen->socket_fd = -1;
    pthread_mutex_init(&xen->lock, NULL);
    xen->ops = &libs_ops;
    return 0;
}
