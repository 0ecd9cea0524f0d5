/* The functions of Xen's libraries that are used, with the libraries' own types. */
#ifndef XEN_LIBS_H
#define XEN_LIBS_H

#include <stddef.h>
#include <stdint.h>

/* A function that a library has to have, and where its address goes. */
struct xen_symbol {
    const char *name;
    void **function;
};

/*
 * Open a library and look its functions up.  On failure `missing` names the library or the
 * function, and the result is a negative errno.  Not for two threads at once.
 */
int xen_libs_load(const char *library, const struct xen_symbol *symbols, size_t count,
                  const char **missing);

struct xen_libs {
    void *(*xengntshr_open)(void *logger, unsigned flags);
    int (*xengntshr_close)(void *handle);
    void *(*xengntshr_share_page_notify)(void *handle, uint32_t domid, uint32_t *ref, int writable,
                                         uint32_t notify_offset, uint32_t notify_port);
    int (*xengntshr_unshare)(void *handle, void *address, uint32_t count);
    void *(*xengnttab_open)(void *logger, unsigned flags);
    int (*xengnttab_close)(void *handle);
    void *(*xengnttab_map_grant_ref)(void *handle, uint32_t domid, uint32_t ref, int protection);
    int (*xengnttab_unmap)(void *handle, void *address, uint32_t count);
    void *(*xenevtchn_open)(void *logger, unsigned flags);
    int (*xenevtchn_close)(void *handle);
    int (*xenevtchn_fd)(void *handle);
    int (*xenevtchn_pending)(void *handle);
    int (*xenevtchn_unmask)(void *handle, uint32_t port);
    int (*xenevtchn_notify)(void *handle, uint32_t port);
    int (*xenevtchn_bind_unbound_port)(void *handle, uint32_t domid);
    int (*xenevtchn_bind_interdomain)(void *handle, uint32_t domid, uint32_t port);
    int (*xenevtchn_unbind)(void *handle, uint32_t port);
};

#endif
