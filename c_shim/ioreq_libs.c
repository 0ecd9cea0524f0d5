#include "ioreq_libs.h"

#include <pthread.h>

#include "xen_libs.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define WANT(name) {#name, (void **)&libs->name}
#define LOAD(library, symbols) \
    xen_libs_load(library, symbols, sizeof(symbols) / sizeof((symbols)[0]), missing)

int ioreq_libs_load(struct ioreq_libs *libs, const char **missing)
{
    const struct xen_symbol model[] = {
        WANT(xendevicemodel_open),
        WANT(xendevicemodel_create_ioreq_server),
        WANT(xendevicemodel_map_io_range_to_ioreq_server),
        WANT(xendevicemodel_unmap_io_range_from_ioreq_server),
        WANT(xendevicemodel_set_ioreq_server_state),
        WANT(xendevicemodel_destroy_ioreq_server),
    };
    const struct xen_symbol memory[] = {
        WANT(xenforeignmemory_open),
        WANT(xenforeignmemory_map),
        WANT(xenforeignmemory_unmap),
        WANT(xenforeignmemory_map_resource),
        WANT(xenforeignmemory_unmap_resource),
    };
    const struct xen_symbol events[] = {
        WANT(xenevtchn_open),    WANT(xenevtchn_fd),     WANT(xenevtchn_pending),
        WANT(xenevtchn_unmask),  WANT(xenevtchn_notify), WANT(xenevtchn_bind_interdomain),
        WANT(xenevtchn_unbind),
    };
    int status;

    pthread_mutex_lock(&lock);
    status = LOAD("libxendevicemodel.so.1", model);
    if (status == 0) {
        status = LOAD("libxenforeignmemory.so.1", memory);
    }
    if (status == 0) {
        status = LOAD("libxenevtchn.so.1", events);
    }
    pthread_mutex_unlock(&lock);
    return status;
}
