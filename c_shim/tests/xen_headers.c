/* Compiled only: Xen's own headers declare what xen_libs.h expects, handles taken as void *. */
#include <xenevtchn.h>
#include <xengnttab.h>

_Static_assert(sizeof(evtchn_port_t) == sizeof(uint32_t), "ports are 32 bits");
_Static_assert(sizeof(domid_t) == sizeof(uint16_t), "domain ids are 16 bits");
_Static_assert(sizeof(xenevtchn_port_or_error_t) == sizeof(int), "ports or errors are ints");

int main(void)
{
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
    int (*restrict_to)(xenevtchn_handle *, domid_t) = xenevtchn_restrict;

    (void)unshare, (void)share, (void)map, (void)unmap, (void)open_tab;
    (void)open_shr, (void)open_evt, (void)bind_unbound, (void)bind, (void)pending;
    (void)unmask, (void)notify, (void)fd, (void)unbind, (void)restrict_to;
    return 0;
}
