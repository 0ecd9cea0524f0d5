#define __XEN_TOOLS__ 1 /* memory.h and hvm/dm_op.h with what is for toolstacks */
/* Compiled only: Xen's own headers declare what xen_libs.h and ioreq_libs.h expect, handles taken as void *. */
#include <stddef.h>

#include <xendevicemodel.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xengnttab.h>
#include <xen/hvm/ioreq.h>
#include <xen/hvm/dm_op.h>
#include <xen/memory.h>

_Static_assert(sizeof(evtchn_port_t) == sizeof(uint32_t), "ports are 32 bits");
_Static_assert(sizeof(domid_t) == sizeof(uint16_t), "domain ids are 16 bits");
_Static_assert(sizeof(xenevtchn_port_or_error_t) == sizeof(int), "ports or errors are ints");

_Static_assert(sizeof(ioservid_t) == sizeof(uint16_t), "servers are 16 bits");
_Static_assert(sizeof(domid_t) == sizeof(uint16_t), "domains are 16 bits");
_Static_assert(sizeof(xen_pfn_t) == sizeof(unsigned long), "frames are longs");
_Static_assert(XENMEM_resource_ioreq_server == 0, "XEN_RESOURCE_IOREQ_SERVER");
_Static_assert(XENMEM_resource_ioreq_server_frame_ioreq(0) == 1, "XEN_RESOURCE_IOREQ_PAGE");
_Static_assert(HVM_IOREQSRV_BUFIOREQ_OFF == 0, "XEN_BUFFERED_REQUESTS_OFF");
_Static_assert(sizeof(struct ioreq) == 32, "a slot");
_Static_assert(offsetof(struct ioreq, vp_eport) == 24, "its port");
_Static_assert(offsetof(struct ioreq, type) == 31, "its type");

int main(void)
{
    int (*create)(xendevicemodel_handle *, domid_t, int, ioservid_t *) =
        xendevicemodel_create_ioreq_server;
    int (*claim)(xendevicemodel_handle *, domid_t, ioservid_t, int, uint64_t, uint64_t) =
        xendevicemodel_map_io_range_to_ioreq_server;
    int (*set_state)(xendevicemodel_handle *, domid_t, ioservid_t, int) =
        xendevicemodel_set_ioreq_server_state;
    xenforeignmemory_resource_handle *(*resource)(xenforeignmemory_handle *, domid_t, unsigned,
                                                  unsigned, unsigned long, unsigned long,
                                                  void **, int, int) =
        xenforeignmemory_map_resource;
    void *(*map_frames)(xenforeignmemory_handle *, uint32_t, int, size_t, const xen_pfn_t *,
                        int *) = xenforeignmemory_map;
    int (*unshare)(xengntshr_handle *, void *, uint32_t) = xengntshr_unshare;
    void *(*share)(xengntshr_handle *, uint32_t, uint32_t *, int, uint32_t, evtchn_port_t) =
        xengntshr_share_page_notify;
    void *(*map)(xengnttab_handle *, uint32_t, uint32_t, int) = xengnttab_map_grant_ref;
    int (*unmap)(xengnttab_handle *, void *, uint32_t) = xengnttab_unmap;
    xengnttab_handle *(*open_tab)(struct xentoollog_logger *, unsigned) = xengnttab_open;
    xengntshr_handle *(*open_shr)(struct xentoollog_logger *, unsigned) = xengntshr_open;
    xenevtchn_handle *(*open_evt)(struct xentoollog_logger *, unsigned) = xenevtchn_open;
    xenevtchn_port_or_error_t (*bind_unbound)(xenevtchn_handle *, uint32_t) =
        xenevtchn_bind_unbound_port;
    xenevtchn_port_or_error_t (*bind)(xenevtchn_handle *, uint32_t, evtchn_port_t) =
        xenevtchn_bind_interdomain;
    xenevtchn_port_or_error_t (*pending)(xenevtchn_handle *) = xenevtchn_pending;
    int (*unmask)(xenevtchn_handle *, evtchn_port_t) = xenevtchn_unmask;
    int (*notify)(xenevtchn_handle *, evtchn_port_t) = xenevtchn_notify;
    int (*fd)(xenevtchn_handle *) = xenevtchn_fd;
    int (*unbind)(xenevtchn_handle *, evtchn_port_t) = xenevtchn_unbind;

    (void)unshare, (void)share, (void)map, (void)unmap, (void)open_tab;
    (void)open_shr, (void)open_evt, (void)bind_unbound, (void)bind, (void)pending;
    (void)unmask, (void)notify, (void)fd, (void)unbind;
    (void)create, (void)claim, (void)set_state, (void)resource, (void)map_frames;
    return 0;
}
