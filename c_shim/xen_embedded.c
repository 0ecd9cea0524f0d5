/*
 * The embedded Xen's grants and event channels: a SOCK_SEQPACKET connection to its
 * hypervisor stand-in, which hands out sealed memfds for pages and pairs of eventfds for
 * ports.
 *
 * What comes over the socket is checked as if the stand-in were hostile: a memfd that
 * could shrink would turn a read of the page into SIGBUS, so its seals and size are
 * looked at before it is mapped.  The eventfds are shared with the peer, flags and
 * counter included: it may clear O_NONBLOCK, drain them or fill them up.  So they are
 * never read while empty, and a notify that would block is one that is pending already.
 */
#include "xen_ops.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    OP_HELLO = 1,
    OP_GRANT_SHARE,
    OP_GRANT_END,
    OP_GRANT_MAP,
    OP_GRANT_UNMAP,
    OP_EVTCHN_ALLOC,
    OP_EVTCHN_BIND,
    OP_EVTCHN_CLOSE,
};

enum { FDS_MAX = 2, ANSWER_TIMEOUT_S = 5 };

struct request {
    uint32_t op, domid, arg;
};

struct reply {
    int32_t status;
    uint32_t value;
};

static void close_all(const int *fds, int count)
{
    for (int i = 0; i < count; i++) {
        close(fds[i]);
    }
}

/* Put the descriptors of a message into `fds`; close what is beyond FDS_MAX. */
static int take_fds(struct msghdr *message, int *fds)
{
    int count = 0;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + at, sizeof(fd));
            if (count < FDS_MAX) {
                fds[count++] = fd;
            } else {
                close(fd);
            }
        }
    }
    return count;
}

static int exchange(int socket_fd, struct request request, uint32_t *value, int *fds, int fds_wanted)
{
    struct reply reply;
    struct iovec part = {.iov_base = &reply, .iov_len = sizeof(reply)};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(4 * sizeof(int))];
    } control;
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    ssize_t got;
    int count;

    if (send(socket_fd, &request, sizeof(request), MSG_NOSIGNAL) != (ssize_t)sizeof(request)) {
        return errno == EAGAIN ? -ETIMEDOUT : -errno;
    }
    do {
        got = recvmsg(socket_fd, &message, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        return errno == EAGAIN ? -ETIMEDOUT : -errno;
    }
    count = take_fds(&message, fds);
    if (got != (ssize_t)sizeof(reply) || reply.status > 0 ||
        count != (reply.status == 0 ? fds_wanted : 0)) {
        close_all(fds, count);
        return got == 0 ? -ECONNRESET : -EPROTO;
    }
    *value = reply.value;
    return reply.status;
}

/* One request and its answer; requests of several threads take turns. */
static int call(struct xen *xen, struct request request, uint32_t *value, int *fds, int fds_wanted)
{
    int status;

    pthread_mutex_lock(&xen->lock);
    status = exchange(xen->socket_fd, request, value, fds, fds_wanted);
    if (status == -ETIMEDOUT) {
        /* A late answer must not be taken for the next request's. */
        shutdown(xen->socket_fd, SHUT_RDWR);
    }
    pthread_mutex_unlock(&xen->lock);
    return status;
}

static int map_memfd(int fd, struct tpmif_page **shared)
{
    struct stat file;
    int seals = fcntl(fd, F_GET_SEALS);
    void *address;

    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &file) != 0 ||
        file.st_size != TPMIF_PAGE_BYTES) {
        return -EPROTO;
    }
    address = mmap(NULL, TPMIF_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) {
        return -errno;
    }
    *shared = address;
    return 0;
}

static int get_page(struct xen *xen, struct request request, struct xen_page *page)
{
    uint32_t value = 0;
    int fds[FDS_MAX];
    int status = call(xen, request, &value, fds, 1);

    if (status == 0) {
        status = map_memfd(fds[0], &page->shared);
        close(fds[0]);
        if (request.op == OP_GRANT_SHARE) {
            page->ref = value;
        }
    }
    return status;
}

static int embedded_share_page(struct xen *xen, uint32_t domid, struct xen_page *page)
{
    return get_page(xen, (struct request){OP_GRANT_SHARE, domid, 0}, page);
}

static int embedded_map_page(struct xen *xen, uint32_t domid, uint32_t ref, struct xen_page *page)
{
    return get_page(xen, (struct request){OP_GRANT_MAP, domid, ref}, page);
}

static void embedded_drop_page(struct xen_page *page)
{
    uint32_t op = page->granted ? OP_GRANT_END : OP_GRANT_UNMAP;
    uint32_t value;
    int fds[FDS_MAX];

    munmap(page->shared, TPMIF_PAGE_BYTES);
    (void)call(page->xen, (struct request){op, page->domid, page->ref}, &value, fds, 0);
}

static int get_channel(struct xen *xen, struct request request, struct xen_channel *channel)
{
    int fds[FDS_MAX];
    int status = call(xen, request, &channel->port, fds, 2);

    if (status == 0) {
        channel->fd = fds[0];
        channel->notify_fd = fds[1];
    }
    return status;
}

static int embedded_alloc_unbound(struct xen *xen, uint32_t domid, struct xen_channel *channel)
{
    return get_channel(xen, (struct request){OP_EVTCHN_ALLOC, domid, 0}, channel);
}

static int embedded_bind_interdomain(struct xen *xen, uint32_t domid, uint32_t port,
                                     struct xen_channel *channel)
{
    return get_channel(xen, (struct request){OP_EVTCHN_BIND, domid, port}, channel);
}

static void embedded_close_channel(struct xen_channel *channel)
{
    uint32_t value;
    int fds[FDS_MAX];

    close(channel->fd);
    close(channel->notify_fd);
    (void)call(channel->xen, (struct request){OP_EVTCHN_CLOSE, 0, channel->port}, &value, fds, 0);
}

static int embedded_notify(struct xen_channel *channel)
{
    uint64_t one = 1;
    struct pollfd room = {.fd = channel->notify_fd, .events = POLLOUT};

    /* A peer that filled the counter up has an event pending, which is all a notify can do.
       Asked before the write, for the peer may also have made the descriptor a blocking one. */
    if (poll(&room, 1, 0) == 0) {
        return 0;
    }
    if (write(channel->notify_fd, &one, sizeof(one)) == (ssize_t)sizeof(one) || errno == EAGAIN) {
        return 0;
    }
    return -errno;
}

/* The pumps wait for edges, and every notify is one, so the counter need not be read. */
static int embedded_take(struct xen_channel *channel)
{
    (void)channel;
    return 0;
}

static int embedded_rearm(struct xen_channel *channel)
{
    (void)channel;
    return 0;
}

static void embedded_close(struct xen *xen)
{
    close(xen->socket_fd);
}

/* One connection does it all, and a domain's socket lets in what the domain may do. */
static int embedded_keep(struct xen *xen, enum xen_role role, unsigned channels)
{
    (void)xen;
    (void)role;
    (void)channels;
    return 0;
}

static const struct xen_ops embedded_ops = {
    .close = embedded_close,
    .keep = embedded_keep,
    .share_page = embedded_share_page,
    .map_page = embedded_map_page,
    .drop_page = embedded_drop_page,
    .alloc_unbound = embedded_alloc_unbound,
    .bind_interdomain = embedded_bind_interdomain,
    .close_channel = embedded_close_channel,
    .notify = embedded_notify,
    .take = embedded_take,
    .rearm = embedded_rearm,
};

int xen_open_embedded(struct xen *xen, const char *path, const char **missing)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval timeout = {.tv_sec = ANSWER_TIMEOUT_S};
    int fds[FDS_MAX];
    int status;

    memset(xen, 0, sizeof(*xen));
    *missing = path;
    if (strlen(path) >= sizeof(address.sun_path)) {
        return -ENAMETOOLONG;
    }
    memcpy(address.sun_path, path, strlen(path) + 1);
    xen->socket_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (xen->socket_fd < 0) {
        return -errno;
    }
    (void)setsockopt(xen->socket_fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    (void)setsockopt(xen->socket_fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (connect(xen->socket_fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        status = -errno;
    } else {
        status = exchange(xen->socket_fd, (struct request){OP_HELLO, 0, 0}, &xen->own_domid, fds, 0);
    }
    if (status != 0) {
        close(xen->socket_fd);
        return status;
    }
    pthread_mutex_init(&xen->lock, NULL);
    xen->ops = &embedded_ops;
    return 0;
}
