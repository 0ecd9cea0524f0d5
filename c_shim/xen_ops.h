/*
 * The few things asked of Xen: share or map a page, make or bind an event channel,
 * notify, and take notice.  Two implementations stand behind one table: Xen's own
 * libraries (xen_libs.c) and the embedded Xen (xen_embedded.c).
 *
 * Everything returns 0 or a negative errno.  Opening, sharing and binding may block for
 * a few milliseconds; notify, take and rearm do not block and are the hot path's.
 */
#ifndef XEN_OPS_H
#define XEN_OPS_H

#include <pthread.h>
#include <stdint.h>

#include "tpmif.h"

struct xen;

struct xen_page {
    struct xen *xen;
    struct tpmif_page *shared; /* NULL: nothing is mapped */
    uint32_t domid;            /* the peer */
    uint32_t ref;
    int granted; /* 1: ours, shared with the peer; 0: the peer's, mapped here */
};

struct xen_channel {
    struct xen *xen; /* NULL: closed */
    int fd;          /* readable when the peer notified */
    int notify_fd;   /* embedded Xen only */
    uint32_t port;
    void *handle; /* Xen's libraries only */
};

enum xen_role { XEN_SHARES, XEN_MAPS }; /* a frontend shares pages, a backend maps them */
enum { XEN_SPARES_MAX = 12 };

struct xen_ops {
    void (*close)(struct xen *xen);
    int (*keep)(struct xen *xen, enum xen_role role, unsigned channels);
    int (*share_page)(struct xen *xen, uint32_t domid, struct xen_page *page);
    int (*map_page)(struct xen *xen, uint32_t domid, uint32_t ref, struct xen_page *page);
    void (*drop_page)(struct xen_page *page);
    int (*alloc_unbound)(struct xen *xen, uint32_t domid, struct xen_channel *channel);
    int (*bind_interdomain)(struct xen *xen, uint32_t domid, uint32_t port,
                            struct xen_channel *channel);
    void (*close_channel)(struct xen_channel *channel);
    int (*notify)(struct xen_channel *channel);
    /* Take pending events.  `rearm` allows the next one; until then the channel is silent. */
    int (*take)(struct xen_channel *channel);
    int (*rearm)(struct xen_channel *channel);
};

struct xen {
    const struct xen_ops *ops;
    uint32_t own_domid; /* UINT32_MAX: Xen does not tell */
    int socket_fd;      /* embedded Xen only */
    pthread_mutex_t lock;
    /* Xen's libraries only: their handles, and event channel handles that are kept open */
    void *gnttab, *gntshr, *spares[XEN_SPARES_MAX];
    unsigned spares_count, spares_kept;
};

/*
 * Open Xen through its libraries, or the embedded Xen at a unix socket.  On failure
 * `missing` names the library, node or socket that could not be opened, and the result
 * is a negative errno.
 */
int xen_open_libs(struct xen *xen, const char **missing);
int xen_open_embedded(struct xen *xen, const char *path, const char **missing);

/*
 * Open in advance, and keep open, what `role` needs for so many event channels at a time:
 * afterwards this process may lose the right to open Xen's devices.  Call it before there
 * are threads.
 */
int xen_keep(struct xen *xen, enum xen_role role, unsigned channels);

/* The table's functions by name, safe to call twice for what closes. */
void xen_close(struct xen *xen);
int xen_share_page(struct xen *xen, uint32_t domid, struct xen_page *page);
int xen_map_page(struct xen *xen, uint32_t domid, uint32_t ref, struct xen_page *page);
void xen_drop_page(struct xen_page *page);
int xen_alloc_unbound(struct xen *xen, uint32_t domid, struct xen_channel *channel);
int xen_bind_interdomain(struct xen *xen, uint32_t domid, uint32_t port,
                         struct xen_channel *channel);
void xen_close_channel(struct xen_channel *channel);

static inline int xen_notify(struct xen_channel *channel)
{
    return channel->xen->ops->notify(channel);
}

static inline int xen_take(struct xen_channel *channel)
{
    return channel->xen->ops->take(channel);
}

static inline int xen_rearm(struct xen_channel *channel)
{
    return channel->xen->ops->rearm(channel);
}

#endif
