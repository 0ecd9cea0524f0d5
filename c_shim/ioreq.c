/*
 * The server side of Xen's ioreq protocol; see ioreq.h.
 *
 * A slot's state goes NONE -> READY (Xen) -> RESP_READY (we) -> NONE (Xen); a virtual CPU
 * has one access at a time, so a slot that is READY is ours alone until it is answered.
 * A slot is also looked at without an event: where a server was adopted, the event of an
 * access went to the process before.
 */
#include "ioreq.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ioreq_libs.h"

/* One virtual CPU's slot in the shared page (hvm/ioreq.h). */
struct slot {
    _Atomic uint64_t address, data;
    _Atomic uint32_t count, size_bytes, event_port;
    uint16_t padding;
    _Atomic uint8_t flags; /* bits 3:0 state */
    _Atomic uint8_t type;
};

_Static_assert(sizeof(struct slot) == 32, "128 slots make a page");

enum {
    STATE_MASK = 0x0f,
    STATE_IOREQ_READY = 1,
    STATE_IOREQ_INPROCESS = 2,
    STATE_IORESP_READY = 3,
    FLAG_DATA_IS_PTR = 0x10,
    FLAG_READ = 0x20,
    FLAG_BACKWARDS = 0x40,
};

enum { PAGE_BYTES = 4096, MAPPED_PAGES = 4 };

struct mapped {
    uint64_t frame;
    uint8_t *page; /* NULL: free */
};

struct ioreq_server {
    uint32_t domid;
    int id;
    uint64_t first, last;
    void *resource;
    struct slot *slots;
    uint32_t vcpus, scan; /* `scan`: slots that are still to be looked at without an event */
    int ports[IOREQ_VCPUS_MAX];
    int stop_fd;
    _Atomic uint64_t answered;
    struct mapped mapped[MAPPED_PAGES];
    uint32_t next_mapped;
};

static struct ioreq_libs libs;

/* Opened once and kept: a process that has given its privileges up cannot open them again. */
static struct {
    void *model, *memory, *events;
} devices;

static int failure(void)
{
    return errno ? -errno : -EIO;
}

struct ioreq_server *ioreq_server_new(void)
{
    struct ioreq_server *server = calloc(1, sizeof(*server));

    if (server) {
        server->id = IOREQ_NO_ID;
        server->stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        if (server->stop_fd < 0) {
            free(server);
            server = NULL;
        }
    }
    return server;
}

static int failed(const char *call, const char **missing)
{
    *missing = call;
    return failure();
}

int ioreq_open_devices(const char **missing)
{
    int status = ioreq_libs_load(&libs, missing);

    if (status != 0) {
        return status;
    }
    errno = 0;
    if (!devices.model && !(devices.model = libs.xendevicemodel_open(NULL, 0))) {
        return failed("xendevicemodel_open", missing);
    }
    if (!devices.memory && !(devices.memory = libs.xenforeignmemory_open(NULL, 0))) {
        return failed("xenforeignmemory_open", missing);
    }
    if (!devices.events && !(devices.events = libs.xenevtchn_open(NULL, 0))) {
        return failed("/dev/xen/evtchn", missing);
    }
    return 0;
}

int ioreq_server_open(struct ioreq_server *server, uint32_t domid, int adopt,
                      const char **missing)
{
    uint16_t id = (uint16_t)adopt;
    void *page = NULL;
    int status = ioreq_open_devices(missing);

    if (status != 0) {
        return status;
    }
    errno = 0;
    server->domid = domid;
    if (adopt < 0 && libs.xendevicemodel_create_ioreq_server(
                         devices.model, (uint16_t)domid, XEN_BUFFERED_REQUESTS_OFF, &id) != 0) {
        return failed("xendevicemodel_create_ioreq_server", missing);
    }
    server->resource = libs.xenforeignmemory_map_resource(
        devices.memory, (uint16_t)domid, XEN_RESOURCE_IOREQ_SERVER, id,
        XEN_RESOURCE_IOREQ_PAGE, 1, &page, PROT_READ | PROT_WRITE, 0);
    if (!server->resource) {
        status = failed("xenforeignmemory_map_resource", missing);
        if (adopt < 0) {
            (void)libs.xendevicemodel_destroy_ioreq_server(devices.model, (uint16_t)domid, id);
        }
        return status;
    }
    server->slots = page;
    server->id = id;
    return id;
}

int ioreq_server_enable(struct ioreq_server *server, uint64_t first, uint64_t last,
                        const char **missing)
{
    uint16_t domid = (uint16_t)server->domid, id = (uint16_t)server->id;

    server->first = first;
    server->last = last;
    errno = 0;
    /* An adopted server has its range. */
    if (libs.xendevicemodel_map_io_range_to_ioreq_server(devices.model, domid, id, 1, first,
                                                         last) != 0 &&
        errno != EEXIST) {
        return failed("xendevicemodel_map_io_range_to_ioreq_server", missing);
    }
    if (libs.xendevicemodel_set_ioreq_server_state(devices.model, domid, id, 1) != 0) {
        return failed("xendevicemodel_set_ioreq_server_state", missing);
    }
    /* Only an enabled server's slots name ports.  All CPUs that the guest can ever have are
     * there from its creation. */
    while (server->vcpus < IOREQ_VCPUS_MAX) {
        uint32_t remote = atomic_load(&server->slots[server->vcpus].event_port);
        int port;

        if (remote == 0) {
            break;
        }
        port = libs.xenevtchn_bind_interdomain(devices.events, server->domid, remote);
        if (port < 0) {
            return failed("xenevtchn_bind_interdomain", missing);
        }
        server->ports[server->vcpus++] = port;
    }
    server->scan = server->vcpus;
    return server->vcpus ? 0 : -ENXIO;
}

uint32_t ioreq_vcpus(const struct ioreq_server *server)
{
    return server->vcpus;
}

uint64_t ioreq_answered(const struct ioreq_server *server)
{
    return atomic_load_explicit(&server->answered, memory_order_relaxed);
}

/* Fill `access` if the CPU waits for an answer. */
static bool take(struct ioreq_server *server, uint32_t vcpu, struct ioreq_access *access)
{
    struct slot *slot = &server->slots[vcpu];
    /* Acquire: Xen wrote the request before it set the state. */
    uint8_t flags = atomic_load_explicit(&slot->flags, memory_order_acquire);
    uint8_t state = flags & STATE_MASK;

    if (state != STATE_IOREQ_READY && state != STATE_IOREQ_INPROCESS) {
        return false;
    }
    access->address = atomic_load_explicit(&slot->address, memory_order_relaxed);
    access->data = atomic_load_explicit(&slot->data, memory_order_relaxed);
    access->count = atomic_load_explicit(&slot->count, memory_order_relaxed);
    access->size_bytes = atomic_load_explicit(&slot->size_bytes, memory_order_relaxed);
    access->type = atomic_load_explicit(&slot->type, memory_order_relaxed);
    access->vcpu = vcpu;
    access->read = flags & FLAG_READ;
    access->data_is_ptr = flags & FLAG_DATA_IS_PTR;
    access->backwards = flags & FLAG_BACKWARDS;
    return true;
}

static int answer_slot(struct ioreq_server *server, const struct ioreq_access *access)
{
    struct slot *slot = &server->slots[access->vcpu];
    uint8_t flags = atomic_load_explicit(&slot->flags, memory_order_relaxed);

    /* Relaxed: one thread counts, and who reads wants a number only. */
    atomic_fetch_add_explicit(&server->answered, 1, memory_order_relaxed);
    atomic_store_explicit(&slot->data, access->data, memory_order_relaxed);
    /* Release: Xen reads the data once it sees the state.  The other bits are Xen's. */
    atomic_store_explicit(&slot->flags, (uint8_t)((flags & ~STATE_MASK) | STATE_IORESP_READY),
                          memory_order_release);
    return libs.xenevtchn_notify(devices.events, (uint32_t)server->ports[access->vcpu]);
}

/* Take one event, and the access that it is about; false where it was about none. */
static int take_event(struct ioreq_server *server, struct ioreq_access *access)
{
    int port = libs.xenevtchn_pending(devices.events);

    if (port < 0) {
        return failure();
    }
    /* Before the slot is read: an event that comes later must not be lost. */
    if (libs.xenevtchn_unmask(devices.events, (uint32_t)port) < 0) {
        return failure();
    }
    for (uint32_t vcpu = 0; vcpu < server->vcpus; vcpu++) {
        if (server->ports[vcpu] == port) {
            return take(server, vcpu, access);
        }
    }
    return 0;
}

int ioreq_next(struct ioreq_server *server, struct ioreq_access *access, bool answer, int fd)
{
    struct pollfd polled[] = {
        {.fd = libs.xenevtchn_fd(devices.events), .events = POLLIN},
        {.fd = server->stop_fd, .events = POLLIN},
        {.fd = fd, .events = POLLIN},
    };

    /* A guest that has died meanwhile is no error: whoever watches it says stop. */
    if (answer) {
        (void)answer_slot(server, access);
    }
    while (server->scan > 0) {
        if (take(server, --server->scan, access)) {
            return IOREQ_ACCESS;
        }
    }
    for (;;) {
        int found = 0;

        if (poll(polled, 3, -1) < 0) {
            if (errno == EINTR) {
                continue;
            }
            return failure();
        }
        if (polled[2].revents) {
            found |= IOREQ_READABLE;
        }
        if (polled[1].revents) {
            found |= IOREQ_STOPPED;
        } else if (polled[0].revents) {
            int status;

            errno = 0;
            status = take_event(server, access);
            if (status < 0) {
                return status;
            }
            found |= status ? IOREQ_ACCESS : 0;
        }
        if (found) {
            return found;
        }
    }
}

void ioreq_stop(struct ioreq_server *server)
{
    uint64_t one = 1;
    ssize_t written = write(server->stop_fd, &one, sizeof(one));

    (void)written; /* a counter that is full is as good */
}

/* Guest memory. */

static struct mapped *map_frame(struct ioreq_server *server, uint64_t frame)
{
    struct mapped *mapped;
    unsigned long frames[] = {(unsigned long)frame};
    int error = 0;

    for (mapped = server->mapped; mapped < server->mapped + MAPPED_PAGES; mapped++) {
        if (mapped->page && mapped->frame == frame) {
            return mapped;
        }
    }
    mapped = &server->mapped[server->next_mapped++ % MAPPED_PAGES];
    if (mapped->page) {
        (void)libs.xenforeignmemory_unmap(devices.memory, mapped->page, 1);
    }
    errno = 0;
    mapped->page = libs.xenforeignmemory_map(devices.memory, server->domid,
                                             PROT_READ | PROT_WRITE, 1, frames, &error);
    if (mapped->page && error) {
        (void)libs.xenforeignmemory_unmap(devices.memory, mapped->page, 1);
        mapped->page = NULL;
        errno = -error;
    }
    mapped->frame = frame;
    return mapped->page ? mapped : NULL;
}

static int copy_memory(struct ioreq_server *server, uint64_t address, uint8_t *to,
                       const uint8_t *from, uint32_t bytes)
{
    while (bytes > 0) {
        struct mapped *mapped = map_frame(server, address / PAGE_BYTES);
        uint32_t at = (uint32_t)(address % PAGE_BYTES);
        uint32_t piece = bytes < PAGE_BYTES - at ? bytes : PAGE_BYTES - at;

        if (!mapped) {
            return failure();
        }
        if (to) {
            memcpy(to, mapped->page + at, piece);
            to += piece;
        } else {
            memcpy(mapped->page + at, from, piece);
            from += piece;
        }
        address += piece;
        bytes -= piece;
    }
    return 0;
}

int ioreq_read_memory(struct ioreq_server *server, uint64_t address, uint8_t *to, uint32_t bytes)
{
    return copy_memory(server, address, to, NULL, bytes);
}

int ioreq_write_memory(struct ioreq_server *server, uint64_t address, const uint8_t *from,
                       uint32_t bytes)
{
    return copy_memory(server, address, NULL, from, bytes);
}

void ioreq_forget_memory(struct ioreq_server *server)
{
    for (struct mapped *mapped = server->mapped; mapped < server->mapped + MAPPED_PAGES;
         mapped++) {
        if (mapped->page) {
            (void)libs.xenforeignmemory_unmap(devices.memory, mapped->page, 1);
            mapped->page = NULL;
        }
    }
}

/* Closing. */

enum { SETTLE_STEP_US = 1000, SETTLE_STEPS = 100 };

/* Answer what CPUs still wait for with all ones; return whether none waits any more. */
static bool settle(struct ioreq_server *server)
{
    bool settled = true;

    for (uint32_t vcpu = 0; vcpu < server->vcpus; vcpu++) {
        struct ioreq_access access;

        if (take(server, vcpu, &access)) {
            access.data = UINT64_MAX;
            (void)answer_slot(server, &access);
        }
        settled &= (atomic_load(&server->slots[vcpu].flags) & STATE_MASK) == 0;
    }
    return settled;
}

void ioreq_server_close(struct ioreq_server *server)
{
    uint16_t domid = (uint16_t)server->domid, id = (uint16_t)server->id;

    if (server->id == IOREQ_NO_ID) {
        return;
    }
    /* Whatever of it fails, the domain has gone, and the server with it. */
    (void)libs.xendevicemodel_set_ioreq_server_state(devices.model, domid, id, 0);
    /* No access comes any more.  A CPU whose answer Xen has not fetched would lose it. */
    for (int step = 0; step < SETTLE_STEPS && !settle(server); step++) {
        (void)usleep(SETTLE_STEP_US);
    }
    (void)libs.xendevicemodel_unmap_io_range_from_ioreq_server(devices.model, domid, id, 1,
                                                               server->first, server->last);
    (void)libs.xendevicemodel_destroy_ioreq_server(devices.model, domid, id);
    server->id = IOREQ_NO_ID;
}

void ioreq_server_free(struct ioreq_server *server)
{
    if (!server) {
        return;
    }
    ioreq_forget_memory(server);
    if (server->resource) {
        (void)libs.xenforeignmemory_unmap_resource(devices.memory, server->resource);
    }
    for (uint32_t vcpu = 0; vcpu < server->vcpus; vcpu++) {
        (void)libs.xenevtchn_unbind(devices.events, (uint32_t)server->ports[vcpu]);
    }
    close(server->stop_fd);
    free(server);
}
