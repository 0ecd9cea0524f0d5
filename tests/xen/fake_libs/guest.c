/* Xen's libraries for a guest's device, as far as they are needed while there is no guest. */
#include <errno.h>
#include <stddef.h>

static int handle;

void *xendevicemodel_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return &handle;
}

void *xenforeignmemory_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return &handle;
}

#define REFUSES(function) \
    int function(void)    \
    {                     \
        errno = ESRCH;    \
        return -1;        \
    }

REFUSES(xendevicemodel_create_ioreq_server)
REFUSES(xendevicemodel_map_io_range_to_ioreq_server)
REFUSES(xendevicemodel_unmap_io_range_from_ioreq_server)
REFUSES(xendevicemodel_set_ioreq_server_state)
REFUSES(xendevicemodel_destroy_ioreq_server)
REFUSES(xenforeignmemory_map)
REFUSES(xenforeignmemory_unmap)
REFUSES(xenforeignmemory_map_resource)
REFUSES(xenforeignmemory_unmap_resource)
