/*
 * Xen's two libraries as far as the shim uses them, without a Xen: pages are anonymous
 * memory, ports are eventfds.  FAKE_FAIL=FUNCTION:ERRNO has one function fail.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

static int fails(const char *function)
{
    const char *wanted = getenv("FAKE_FAIL");
    size_t length = strlen(function);

    if (wanted && strncmp(wanted, function, length) == 0 && wanted[length] == ':') {
        errno = atoi(wanted + length + 1);
        return 1;
    }
    return 0;
}

static int handle;

#ifdef GRANTS
void *xengntshr_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return fails("xengntshr_open") ? NULL : &handle;
}

int xengntshr_close(void *h)
{
    return h == &handle ? 0 : -1;
}

void *xengntshr_share_page_notify(void *h, uint32_t domid, uint32_t *ref, int writable,
                                  uint32_t offset, uint32_t port)
{
    /* The state byte is zeroed when this process dies, and no port is rung. */
    if (h != &handle || domid != 2 || !writable || offset != 4 || port != UINT32_MAX) {
        errno = EDOM;
        return NULL;
    }
    if (fails("xengntshr_share_page_notify")) {
        return NULL;
    }
    *ref = 77;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(page, 0xee, 4096); /* not every library gives zeroed pages */
    return page;
}

int xengntshr_unshare(void *h, void *page, uint32_t count)
{
    return h == &handle && count == 1 ? munmap(page, 4096) : -1;
}

void *xengnttab_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return fails("xengnttab_open") ? NULL : &handle;
}

int xengnttab_close(void *h)
{
    return h == &handle ? 0 : -1;
}

void *xengnttab_map_grant_ref(void *h, uint32_t domid, uint32_t ref, int protection)
{
    if (h != &handle || domid != 3 || ref != 78 || fails("xengnttab_map_grant_ref")) {
        return NULL;
    }
    return mmap(NULL, 4096, protection, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

#ifndef LACKS_UNMAP
int xengnttab_unmap(void *h, void *page, uint32_t count)
{
    return h == &handle && count == 1 ? munmap(page, 4096) : -1;
}
#endif
#else
struct events {
    int fd;
    uint32_t port;
};

static int opened;

void *xenevtchn_open(void *logger, unsigned flags)
{
    struct events *events;

    (void)logger, (void)flags;
    if (fails("xenevtchn_open")) {
        return NULL;
    }
    if (getenv("FAKE_OPENS") && opened == atoi(getenv("FAKE_OPENS"))) {
        errno = EACCES; /* this process may not open the device any more */
        return NULL;
    }
    opened++;
    events = calloc(1, sizeof(*events));
    events->fd = eventfd(0, 0); /* blocks, as the device does */
    return events;
}

int xenevtchn_close(void *h)
{
    close(((struct events *)h)->fd);
    free(h);
    return 0;
}

int xenevtchn_fd(void *h)
{
    return ((struct events *)h)->fd;
}

int xenevtchn_bind_unbound_port(void *h, uint32_t domid)
{
    struct events *events = h;

    events->port = 40 + domid;
    return fails("xenevtchn_bind_unbound_port") ? -1 : (int)(40 + domid);
}

int xenevtchn_bind_interdomain(void *h, uint32_t domid, uint32_t port)
{
    ((struct events *)h)->port = port + domid;
    return fails("xenevtchn_bind_interdomain") ? -1 : (int)(port + domid);
}

/* An event that nobody took stays behind, as it does in the device's ring. */
int xenevtchn_unbind(void *h, uint32_t port)
{
    struct events *events = h;

    if (port != events->port || fails("xenevtchn_unbind")) {
        return -1;
    }
    events->port = 0;
    return 0;
}

/* Whoever notifies finds its own event: both ends are here. */
int xenevtchn_notify(void *h, uint32_t port)
{
    struct events *events = h;

    if (port != events->port || fails("xenevtchn_notify")) {
        return -1;
    }
    return eventfd_write(events->fd, 1);
}

int xenevtchn_pending(void *h)
{
    eventfd_t count;

    return eventfd_read(((struct events *)h)->fd, &count) == 0 ? (int)((struct events *)h)->port : -1;
}

int xenevtchn_unmask(void *h, uint32_t port)
{
    return port == ((struct events *)h)->port ? 0 : -1;
}
#endif
