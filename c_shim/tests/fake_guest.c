/*
 * What Xen does for one guest with one ioreq server.  xendevicemodel, xenforeignmemory and
 * xenevtchn of the tests are empty libraries that depend on this one.
 */
#include "fake_guest.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../ioreq_libs.h"

enum { PAGE = 4096, PORTS_FROM = 40, SERVER_ID = 3 };

struct slot {
    _Atomic uint64_t address, data;
    _Atomic uint32_t count, size, port;
    uint16_t padding;
    _Atomic uint8_t flags, type;
};

static struct slot slots[PAGE / sizeof(struct slot)] __attribute__((aligned(PAGE)));
static uint8_t memory[FAKE_PAGES * PAGE] __attribute__((aligned(PAGE)));
static atomic_int mappings, servers, event_fd = -1;
static atomic_bool enabled, pending[FAKE_VCPUS], bound[FAKE_VCPUS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t answered = PTHREAD_COND_INITIALIZER;

/* The guest's side. */

void fake_touch_silently(uint32_t vcpu, const struct fake_access *access)
{
    struct slot *slot = &slots[vcpu];

    slot->address = access->address;
    slot->data = access->data;
    slot->count = access->count;
    slot->size = access->size;
    slot->type = access->type;
    atomic_store(&slot->flags,
                 (uint8_t)(1 | (access->data_is_ptr ? 0x10 : 0) | (access->read ? 0x20 : 0)));
}

uint64_t fake_wait(uint32_t vcpu)
{
    uint64_t data;

    pthread_mutex_lock(&lock);
    while ((atomic_load(&slots[vcpu].flags) & 0xf) != 3) {
        pthread_cond_wait(&answered, &lock);
    }
    pthread_mutex_unlock(&lock);
    data = slots[vcpu].data;
    atomic_store(&slots[vcpu].flags, 0);
    return data;
}

static void send_event(void)
{
    uint64_t one = 1;

    if (write(event_fd, &one, sizeof(one)) < 0) {
        abort();
    }
}

uint64_t fake_touch(uint32_t vcpu, const struct fake_access *access)
{
    fake_touch_silently(vcpu, access);
    atomic_store(&pending[vcpu], true);
    send_event();
    return fake_wait(vcpu);
}

uint8_t *fake_memory(void)
{
    return memory;
}

int fake_mappings(void)
{
    return mappings;
}

int fake_servers(void)
{
    return servers;
}

bool fake_enabled(void)
{
    return enabled;
}

/* xendevicemodel */

void *xendevicemodel_open(void *logger, unsigned flags);
int xendevicemodel_create_ioreq_server(void *handle, uint16_t domid, int buffered, uint16_t *id);
int xendevicemodel_map_io_range_to_ioreq_server(void *handle, uint16_t domid, uint16_t id,
                                                int is_mmio, uint64_t first, uint64_t last);
int xendevicemodel_unmap_io_range_from_ioreq_server(void *handle, uint16_t domid, uint16_t id,
                                                    int is_mmio, uint64_t first, uint64_t last);
int xendevicemodel_set_ioreq_server_state(void *handle, uint16_t domid, uint16_t id, int on);
int xendevicemodel_destroy_ioreq_server(void *handle, uint16_t domid, uint16_t id);
void *xenforeignmemory_open(void *logger, unsigned flags);
void *xenforeignmemory_map(void *handle, uint32_t domid, int protection, size_t pages,
                           const unsigned long *frames, int *errors);
int xenforeignmemory_unmap(void *handle, void *address, size_t pages);
void *xenforeignmemory_map_resource(void *handle, uint16_t domid, unsigned type, unsigned id,
                                    unsigned long frame, unsigned long frames, void **address,
                                    int protection, int flags);
int xenforeignmemory_unmap_resource(void *handle, void *resource);
void *xenevtchn_open(void *logger, unsigned flags);
int xenevtchn_unbind(void *handle, uint32_t port);
int xenevtchn_fd(void *handle);
int xenevtchn_pending(void *handle);
int xenevtchn_unmask(void *handle, uint32_t port);
int xenevtchn_notify(void *handle, uint32_t port);
int xenevtchn_bind_interdomain(void *handle, uint32_t domid, uint32_t port);

static int refuse(int number)
{
    errno = number;
    return -1;
}

void *xendevicemodel_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return &servers;
}

int xendevicemodel_create_ioreq_server(void *handle, uint16_t domid, int buffered, uint16_t *id)
{
    (void)handle;
    if (domid != FAKE_DOMID || buffered) {
        return refuse(ESRCH);
    }
    servers++;
    *id = SERVER_ID;
    return 0;
}

int xendevicemodel_map_io_range_to_ioreq_server(void *handle, uint16_t domid, uint16_t id,
                                                int is_mmio, uint64_t first, uint64_t last)
{
    static uint64_t claimed;

    (void)handle, (void)domid, (void)last;
    if (id != SERVER_ID || !is_mmio) {
        return refuse(ENOENT);
    }
    if (claimed == first && enabled) {
        return refuse(EEXIST);
    }
    claimed = first;
    return 0;
}

int xendevicemodel_unmap_io_range_from_ioreq_server(void *handle, uint16_t domid, uint16_t id,
                                                    int is_mmio, uint64_t first, uint64_t last)
{
    (void)handle, (void)domid, (void)id, (void)is_mmio, (void)first, (void)last;
    return 0;
}

int xendevicemodel_set_ioreq_server_state(void *handle, uint16_t domid, uint16_t id, int on)
{
    (void)handle, (void)domid, (void)id;
    for (uint32_t vcpu = 0; vcpu < FAKE_VCPUS; vcpu++) {
        slots[vcpu].port = PORTS_FROM + vcpu;
    }
    enabled = on;
    return 0;
}

int xendevicemodel_destroy_ioreq_server(void *handle, uint16_t domid, uint16_t id)
{
    (void)handle, (void)domid, (void)id;
    servers--;
    return 0;
}

/* xenforeignmemory */

void *xenforeignmemory_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return &mappings;
}

void *xenforeignmemory_map(void *handle, uint32_t domid, int protection, size_t pages,
                           const unsigned long *frames, int *errors)
{
    (void)handle, (void)domid, (void)protection, (void)pages;
    mappings++;
    if (frames[0] < FAKE_FIRST_FRAME || frames[0] >= FAKE_FIRST_FRAME + FAKE_PAGES) {
        errors[0] = -EINVAL;
        return memory;
    }
    return memory + (frames[0] - FAKE_FIRST_FRAME) * PAGE;
}

int xenforeignmemory_unmap(void *handle, void *address, size_t pages)
{
    (void)handle, (void)address, (void)pages;
    mappings--;
    return 0;
}

void *xenforeignmemory_map_resource(void *handle, uint16_t domid, unsigned type, unsigned id,
                                    unsigned long frame, unsigned long frames, void **address,
                                    int protection, int flags)
{
    (void)handle, (void)domid, (void)protection, (void)flags;
    if (type != XEN_RESOURCE_IOREQ_SERVER || id != SERVER_ID || frame != 1 || frames != 1) {
        errno = ENOENT;
        return NULL;
    }
    *address = slots;
    return slots;
}

int xenforeignmemory_unmap_resource(void *handle, void *resource)
{
    (void)handle, (void)resource;
    return 0;
}

/* xenevtchn */

void *xenevtchn_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    event_fd = eventfd(0, EFD_NONBLOCK | EFD_SEMAPHORE);
    return &event_fd;
}

int xenevtchn_unbind(void *handle, uint32_t port)
{
    (void)handle;
    bound[port - PORTS_FROM] = false;
    return 0;
}

int xenevtchn_fd(void *handle)
{
    (void)handle;
    return event_fd;
}

int xenevtchn_pending(void *handle)
{
    uint64_t count;

    (void)handle;
    if (read(event_fd, &count, sizeof(count)) < 0) {
        return -1;
    }
    for (uint32_t vcpu = 0; vcpu < FAKE_VCPUS; vcpu++) {
        bool yes = true;

        if (atomic_compare_exchange_strong(&pending[vcpu], &yes, false)) {
            return (int)(PORTS_FROM + vcpu);
        }
    }
    return PORTS_FROM;
}

int xenevtchn_unmask(void *handle, uint32_t port)
{
    (void)handle, (void)port;
    return 0;
}

int xenevtchn_notify(void *handle, uint32_t port)
{
    (void)handle, (void)port;
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&answered);
    pthread_mutex_unlock(&lock);
    return 0;
}

int xenevtchn_bind_interdomain(void *handle, uint32_t domid, uint32_t port)
{
    (void)handle, (void)domid;
    if (atomic_exchange(&bound[port - PORTS_FROM], true)) {
        return refuse(EINVAL);
    }
    return (int)port;
}
