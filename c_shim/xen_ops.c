#include "xen_ops.h"

#include <errno.h>
#include <string.h>

void xen_close(struct xen *xen)
{
    if (xen->ops) {
        xen->ops->close(xen);
        pthread_mutex_destroy(&xen->lock);
        xen->ops = NULL;
    }
}

int xen_keep(struct xen *xen, enum xen_role role, unsigned channels)
{
    return channels > XEN_SPARES_MAX ? -E2BIG : xen->ops->keep(xen, role, channels);
}

int xen_share_page(struct xen *xen, uint32_t domid, struct xen_page *page)
{
    memset(page, 0, sizeof(*page));
    page->xen = xen;
    page->domid = domid;
    page->granted = 1;
    return xen->ops->share_page(xen, domid, page);
}

int xen_map_page(struct xen *xen, uint32_t domid, uint32_t ref, struct xen_page *page)
{
    memset(page, 0, sizeof(*page));
    page->xen = xen;
    page->domid = domid;
    page->ref = ref;
    return xen->ops->map_page(xen, domid, ref, page);
}

void xen_drop_page(struct xen_page *page)
{
    if (page->shared) {
        page->xen->ops->drop_page(page);
        page->shared = NULL;
    }
}

static int opened(struct xen *xen, struct xen_channel *channel, int status)
{
    if (status == 0) {
        channel->xen = xen;
    }
    return status;
}

int xen_alloc_unbound(struct xen *xen, uint32_t domid, struct xen_channel *channel)
{
    memset(channel, 0, sizeof(*channel));
    return opened(xen, channel, xen->ops->alloc_unbound(xen, domid, channel));
}

int xen_bind_interdomain(struct xen *xen, uint32_t domid, uint32_t port,
                         struct xen_channel *channel)
{
    memset(channel, 0, sizeof(*channel));
    return opened(xen, channel, xen->ops->bind_interdomain(xen, domid, port, channel));
}

void xen_close_channel(struct xen_channel *channel)
{
    if (channel->xen) {
        channel->xen->ops->close_channel(channel);
        channel->xen = NULL;
    }
}
