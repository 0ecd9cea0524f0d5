/*
 * LD_PRELOAD library in which Debian's real xenstored and oxenstored run on a machine
 * without Xen, with domains that speak to them over their rings as guests do.
 *
 * A xenstored needs of Xen: which domains live (xc_domain_getinfo and its like), the page
 * that holds a domain's ring, and event channels: one for each ring, and VIRQ_DOM_EXC,
 * which says that some domain died.  Here all of it lies in the directory $NOXEN_DIR:
 *
 *   dom-<N>.ring    one page, xenstore_domain_interface of <xen/io/xs_wire.h>; the domain
 *                   lives as long as this file is there, and domain 0 always
 *   dom-<N>.sock    where domain N waits for a datagram: its event channel fired
 *   events.sock     where the daemon waits for datagrams of four bytes: the number of the
 *                   domain whose event channel fired, or NOXEN_VIRQ
 *   xsd_port        domain 0's event channel, which xenstored reads as text
 *
 * oxenstored has the path of its socket compiled in; $NOXEN_SOCKET is used in its place.
 * Nothing here is a test of Xen itself: grants and event channels are as they are
 * described above, XenStore is the daemon's own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <xenctrl.h>
#include <xenevtchn.h>
#include <xengnttab.h>

enum {
    PAGE_BYTES = 4096,
    PORTS_MAX = 1024,
    DOMIDS_END = 0x7ff0, /* the first reserved domain id */
};

#define NOXEN_VIRQ UINT32_MAX
#define NO_DOMAIN (UINT32_MAX - 1)
#define COMPILED_IN_SOCKET "xenstored/socket"

static int events_fd = -1;
/* What each port leads to; a daemon is one thread, and nothing else calls these. */
static uint32_t domid_of_port[PORTS_MAX];
static uint32_t ports_used = 1; /* port 0 is never given out */

static const char *directory(void)
{
    const char *found = getenv("NOXEN_DIR");

    if (!found) {
        fprintf(stderr, "noxen: NOXEN_DIR is not set\n");
        abort();
    }
    return found;
}

static const char *place(char *path, size_t size, const char *kind, uint32_t domid)
{
    int length = snprintf(path, size, "%s/dom-%u.%s", directory(), domid, kind);

    if (length < 0 || (size_t)length >= size) {
        fprintf(stderr, "noxen: NOXEN_DIR is too long\n");
        abort();
    }
    return path;
}

static bool lives(uint32_t domid)
{
    char path[256];

    return domid == 0 || access(place(path, sizeof(path), "ring", domid), F_OK) == 0;
}

/* Map a domain's ring; NULL and an errno where there is no such domain. */
static void *map_ring(uint32_t domid)
{
    char path[256];
    int fd = open(place(path, sizeof(path), "ring", domid), O_RDWR | O_CLOEXEC);
    void *page;

    if (fd < 0) {
        return NULL;
    }
    page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return page == MAP_FAILED ? NULL : page;
}

/* Domains: libxenctrl. */

xc_interface *xc_interface_open(xentoollog_logger *logger, xentoollog_logger *dombuild_logger,
                                unsigned flags)
{
    (void)logger, (void)dombuild_logger, (void)flags;
    return calloc(1, 64);
}

int xc_interface_close(xc_interface *handle)
{
    free(handle);
    return 0;
}

/* xenstored asks for one domain, and looks whether the answer is about that one. */
int xc_domain_getinfo(xc_interface *handle, uint32_t first, unsigned int max, xc_dominfo_t *info)
{
    unsigned int count = 0;

    (void)handle;
    for (uint32_t domid = first; domid < DOMIDS_END && count < max; domid++) {
        if (lives(domid)) {
            memset(&info[count], 0, sizeof(info[count]));
            info[count].domid = domid;
            info[count].running = 1;
            info[count].nr_pages = 1024;
            count++;
        } else if (max == 1) {
            break;
        }
    }
    return (int)count;
}

int xc_domain_getinfolist(xc_interface *handle, uint32_t first, unsigned int max,
                          xc_domaininfo_t *info)
{
    unsigned int count = 0;

    (void)handle;
    for (uint32_t domid = first; domid < DOMIDS_END && count < max; domid++) {
        if (lives(domid)) {
            memset(&info[count], 0, sizeof(info[count]));
            info[count].domain = (domid_t)domid;
            info[count].flags = XEN_DOMINF_running;
            count++;
        } else if (max == 1) {
            break;
        }
    }
    return (int)count;
}

/* oxenstored maps a ring by its frame, xenstored by its grant: here it is the domain's. */
void *xc_map_foreign_range(xc_interface *handle, uint32_t domid, int size, int prot,
                           unsigned long frame)
{
    (void)handle, (void)size, (void)prot, (void)frame;
    return map_ring(domid);
}

/* Grants: libxengnttab. */

xengnttab_handle *xengnttab_open(xentoollog_logger *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return calloc(1, 64);
}

int xengnttab_close(xengnttab_handle *handle)
{
    free(handle);
    return 0;
}

int xengnttab_set_max_grants(xengnttab_handle *handle, uint32_t count)
{
    (void)handle, (void)count;
    return 0;
}

void *xengnttab_map_grant_ref(xengnttab_handle *handle, uint32_t domid, uint32_t ref, int prot)
{
    (void)handle, (void)ref, (void)prot;
    return map_ring(domid);
}

int xengnttab_unmap(xengnttab_handle *handle, void *start, uint32_t count)
{
    (void)handle;
    return munmap(start, (size_t)PAGE_BYTES * count);
}

/* Event channels: libxenevtchn. */

static void address_of(struct sockaddr_un *address, const char *path)
{
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof(address->sun_path)) {
        fprintf(stderr, "noxen: %s: too long for a socket\n", path);
        abort();
    }
    strcpy(address->sun_path, path);
}

static int (*real_bind(void))(int, const struct sockaddr *, socklen_t)
{
    int (*found)(int, const struct sockaddr *, socklen_t);

    *(void **)&found = dlsym(RTLD_NEXT, "bind");
    return found;
}

static int (*real_unlink(void))(const char *)
{
    int (*found)(const char *);

    *(void **)&found = dlsym(RTLD_NEXT, "unlink");
    return found;
}

xenevtchn_handle *xenevtchn_open(xentoollog_logger *logger, unsigned int flags)
{
    struct sockaddr_un address;
    char path[256];

    (void)logger, (void)flags;
    if (events_fd < 0) {
        snprintf(path, sizeof(path), "%s/events.sock", directory());
        address_of(&address, path);
        (void)real_unlink()(path);
        events_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (events_fd < 0 ||
            real_bind()(events_fd, (const struct sockaddr *)&address, sizeof(address)) != 0) {
            return NULL;
        }
    }
    return calloc(1, 64);
}

xenevtchn_handle *xenevtchn_fdopen(xentoollog_logger *logger, int fd, unsigned int flags)
{
    (void)fd;
    return xenevtchn_open(logger, flags);
}

int xenevtchn_close(xenevtchn_handle *handle)
{
    free(handle);
    return 0;
}

int xenevtchn_fd(xenevtchn_handle *handle)
{
    (void)handle;
    return events_fd;
}

static xenevtchn_port_or_error_t new_port(uint32_t domid)
{
    if (ports_used == PORTS_MAX) {
        errno = ENOSPC;
        return -1;
    }
    domid_of_port[ports_used] = domid;
    return (xenevtchn_port_or_error_t)ports_used++;
}

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *handle, uint32_t domid,
                                                     evtchn_port_t remote_port)
{
    (void)handle, (void)remote_port;
    return new_port(domid);
}

xenevtchn_port_or_error_t xenevtchn_bind_virq(xenevtchn_handle *handle, unsigned int virq)
{
    (void)handle, (void)virq;
    return new_port(NOXEN_VIRQ);
}

int xenevtchn_unbind(xenevtchn_handle *handle, evtchn_port_t port)
{
    (void)handle;
    if (port < PORTS_MAX) {
        domid_of_port[port] = NO_DOMAIN;
    }
    return 0;
}

int xenevtchn_unmask(xenevtchn_handle *handle, evtchn_port_t port)
{
    (void)handle, (void)port;
    return 0;
}

int xenevtchn_notify(xenevtchn_handle *handle, evtchn_port_t port)
{
    struct sockaddr_un address;
    char path[256];
    uint32_t domid = port < PORTS_MAX ? domid_of_port[port] : NO_DOMAIN;

    (void)handle;
    if (domid < DOMIDS_END) {
        address_of(&address, place(path, sizeof(path), "sock", domid));
        /* Nobody there, or enough datagrams waiting: an event more changes nothing. */
        (void)sendto(events_fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL,
                     (const struct sockaddr *)&address, sizeof(address));
    }
    return 0;
}

/* xenstored ends itself when this fails, so an event of a domain that has no port any more
   is one of port 0, which is nobody's. */
xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *handle)
{
    uint32_t domid;

    (void)handle;
    if (recv(events_fd, &domid, sizeof(domid), 0) != (ssize_t)sizeof(domid)) {
        return -1;
    }
    for (uint32_t port = 1; port < ports_used; port++) {
        if (domid_of_port[port] == domid) {
            return (xenevtchn_port_or_error_t)port;
        }
    }
    return 0;
}

/* Files whose places are compiled in. */

static const char *moved(const char *path, char *buffer, size_t size)
{
    if (strcmp(path, "/proc/xen/xsd_kva") == 0) {
        return place(buffer, size, "ring", 0);
    }
    if (strcmp(path, "/proc/xen/xsd_port") == 0) {
        snprintf(buffer, size, "%s/xsd_port", directory());
        return buffer;
    }
    return path;
}

static int open_moved(const char *name, const char *path, int flags, mode_t mode)
{
    int (*real)(const char *, int, ...);
    char buffer[256];

    *(void **)&real = dlsym(RTLD_NEXT, name);
    return real(moved(path, buffer, sizeof(buffer)), flags, mode);
}

static mode_t mode_in(int flags, va_list arguments)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

int open(const char *path, int flags, ...)
{
    va_list arguments;
    mode_t mode;

    va_start(arguments, flags);
    mode = mode_in(flags, arguments);
    va_end(arguments);
    return open_moved("open", path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    mode_t mode;

    va_start(arguments, flags);
    mode = mode_in(flags, arguments);
    va_end(arguments);
    return open_moved("open64", path, flags, mode);
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    const struct sockaddr_un *wanted = (const void *)address;
    const char *path = getenv("NOXEN_SOCKET");
    struct sockaddr_un other;

    if (path && address->sa_family == AF_UNIX && strstr(wanted->sun_path, COMPILED_IN_SOCKET)) {
        address_of(&other, path);
        return real_bind()(fd, (const struct sockaddr *)&other, sizeof(other));
    }
    return real_bind()(fd, address, length);
}

int unlink(const char *path)
{
    const char *other = getenv("NOXEN_SOCKET");

    return real_unlink()(other && strstr(path, COMPILED_IN_SOCKET) ? other : path);
}

/* Raising limits takes privileges that a test need not have. */
int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit)
{
    (void)resource, (void)limit;
    return 0;
}
