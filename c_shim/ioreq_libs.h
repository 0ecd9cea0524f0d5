/* The functions of Xen's device model libraries that ioreq.c uses, with the libraries' types. */
#ifndef IOREQ_LIBS_H
#define IOREQ_LIBS_H

#include <stddef.h>
#include <stdint.h>

/* HVM_IOREQSRV_BUFIOREQ_OFF (hvm/dm_op.h); XENMEM_resource_ioreq_server and
 * XENMEM_resource_ioreq_server_frame_ioreq(0) (memory.h). */
enum {
    XEN_BUFFERED_REQUESTS_OFF = 0,
    XEN_RESOURCE_IOREQ_SERVER = 0,
    XEN_RESOURCE_IOREQ_PAGE = 1,
};

struct ioreq_libs {
    void *(*xendevicemodel_open)(void *logger, unsigned flags);
    int (*xendevicemodel_create_ioreq_server)(void *handle, uint16_t domid, int buffered,
                                              uint16_t *id);
    int (*xendevicemodel_map_io_range_to_ioreq_server)(void *handle, uint16_t domid, uint16_t id,
                                                       int is_mmio, uint64_t first,
                                                       uint64_t last);
    int (*xendevicemodel_unmap_io_range_from_ioreq_server)(void *handle, uint16_t domid,
                                                           uint16_t id, int is_mmio,
                                                           uint64_t first, uint64_t last);
    int (*xendevicemodel_set_ioreq_server_state)(void *handle, uint16_t domid, uint16_t id,
                                                 int enabled);
    int (*xendevicemodel_destroy_ioreq_server)(void *handle, uint16_t domid, uint16_t id);

    void *(*xenforeignmemory_open)(void *logger, unsigned flags);
    void *(*xenforeignmemory_map)(void *handle, uint32_t domid, int protection, size_t pages,
                                  const unsigned long *frames, int *errors);
    int (*xenforeignmemory_unmap)(void *handle, void *address, size_t pages);
    void *(*xenforeignmemory_map_resource)(void *handle, uint16_t domid, unsigned type,
                                           unsigned id, unsigned long frame, unsigned long frames,
                                           void **address, int protection, int flags);
    int (*xenforeignmemory_unmap_resource)(void *handle, void *resource);

    void *(*xenevtchn_open)(void *logger, unsigned flags);
    int (*xenevtchn_fd)(void *handle);
    int (*xenevtchn_pending)(void *handle);
    int (*xenevtchn_unmask)(void *handle, uint32_t port);
    int (*xenevtchn_notify)(void *handle, uint32_t port);
    int (*xenevtchn_bind_interdomain)(void *handle, uint32_t domid, uint32_t port);
    int (*xenevtchn_unbind)(void *handle, uint32_t port);
};

/* Fill `libs`; see xen_libs_load.  For any thread. */
int ioreq_libs_load(struct ioreq_libs *libs, const char **missing);

#endif
