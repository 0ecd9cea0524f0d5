/* The client of the embedded Xen against a server that sends what it should not. */
#include <sys/un.h>

#include "check.h"

struct reply {
    int32_t status;
    uint32_t value;
};

/* What the server answers to the request after HELLO. */
enum answer {
    GOOD_PAGE,
    SHORT_MEMFD,
    UNSEALED_MEMFD,
    NO_DESCRIPTOR,
    TOO_MANY_DESCRIPTORS,
    POSITIVE_STATUS,
    REFUSAL,
    DESCRIPTOR_WITH_REFUSAL,
    TRUNCATED,
    HANG_UP,
    GOOD_CHANNEL,
    ONE_EVENTFD,
    ANSWERS,
};

struct server {
    int listener;
    enum answer answer;
};

static int page_memfd(off_t bytes, bool sealed)
{
    int fd = memfd_create("page", MFD_ALLOW_SEALING | MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, bytes) == 0);
    if (sealed) {
        CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    }
    return fd;
}

static void send_reply(int connection, int32_t status, size_t bytes, const int *fds, int count)
{
    struct reply reply = {status, 8};
    struct iovec part = {&reply, bytes};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(4 * sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    if (count > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        *CMSG_FIRSTHDR(&message) = (struct cmsghdr){.cmsg_level = SOL_SOCKET,
                                                    .cmsg_type = SCM_RIGHTS,
                                                    .cmsg_len = CMSG_LEN((size_t)count * sizeof(int))};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), fds, (size_t)count * sizeof(int));
    }
    CHECK(sendmsg(connection, &message, MSG_NOSIGNAL) >= 0);
}

/* A peer shares the eventfd's counter and flags: it fills the one up and takes O_NONBLOCK off. */
static void spoil(int fd)
{
    const uint64_t most = UINT64_MAX - 1;

    CHECK(write(fd, &most, sizeof(most)) == sizeof(most));
    CHECK(fcntl(fd, F_SETFL, 0) == 0);
}

/* None of these may block, or this test ends by its timeout. */
static void use_spoilt(struct xen_channel *channel)
{
    uint64_t count;

    CHECK(xen_notify(channel) == 0);
    CHECK(read(channel->notify_fd, &count, sizeof(count)) == sizeof(count)); /* drained */
    CHECK(xen_notify(channel) == 0);
    CHECK(read(channel->notify_fd, &count, sizeof(count)) == sizeof(count) && count == 1);
    CHECK(fcntl(channel->fd, F_SETFL, 0) == 0);
    CHECK(xen_take(channel) == 0 && xen_rearm(channel) == 0); /* nothing there, and no read */
}

static void *serve(void *opaque)
{
    struct server *server = opaque;
    int connection = accept(server->listener, NULL, NULL);
    uint32_t request[3];
    int fds[3] = {page_memfd(4096, true), page_memfd(4096, true), page_memfd(4096, true)};
    int notify = eventfd(0, EFD_NONBLOCK), events[2] = {eventfd(0, EFD_NONBLOCK), notify};
    int shorter = page_memfd(4095, true), unsealed = page_memfd(4096, false);

    CHECK(recv(connection, request, sizeof(request), 0) == sizeof(request));
    send_reply(connection, 0, sizeof(struct reply), NULL, 0);
    CHECK(recv(connection, request, sizeof(request), 0) == sizeof(request));
    switch (server->answer) {
    case GOOD_PAGE:
        send_reply(connection, 0, sizeof(struct reply), fds, 1);
        CHECK(recv(connection, request, sizeof(request), 0) == sizeof(request));
        send_reply(connection, 0, sizeof(struct reply), NULL, 0);
        break;
    case SHORT_MEMFD:
        send_reply(connection, 0, sizeof(struct reply), &shorter, 1);
        break;
    case UNSEALED_MEMFD:
        send_reply(connection, 0, sizeof(struct reply), &unsealed, 1);
        break;
    case NO_DESCRIPTOR:
        send_reply(connection, 0, sizeof(struct reply), NULL, 0);
        break;
    case TOO_MANY_DESCRIPTORS:
        send_reply(connection, 0, sizeof(struct reply), fds, 3);
        break;
    case POSITIVE_STATUS:
        send_reply(connection, 1, sizeof(struct reply), NULL, 0);
        break;
    case REFUSAL:
        send_reply(connection, -EINVAL, sizeof(struct reply), NULL, 0);
        break;
    case DESCRIPTOR_WITH_REFUSAL:
        send_reply(connection, -EINVAL, sizeof(struct reply), fds, 1);
        break;
    case TRUNCATED:
        send_reply(connection, 0, 4, fds, 1);
        break;
    case GOOD_CHANNEL:
        spoil(notify);
        send_reply(connection, 0, sizeof(struct reply), events, 2);
        CHECK(recv(connection, request, sizeof(request), 0) == sizeof(request));
        send_reply(connection, 0, sizeof(struct reply), NULL, 0);
        break;
    case ONE_EVENTFD:
        send_reply(connection, 0, sizeof(struct reply), events, 1);
        break;
    default:
        break;
    }
    close(events[0]);
    close(notify);
    for (int i = 0; i < 3; i++) {
        close(fds[i]);
    }
    close(shorter);
    close(unsealed);
    close(connection);
    return NULL;
}

int main(void)
{
    const int expected[ANSWERS] = {
        [GOOD_PAGE] = 0,
        [SHORT_MEMFD] = -EPROTO,
        [UNSEALED_MEMFD] = -EPROTO,
        [NO_DESCRIPTOR] = -EPROTO,
        [TOO_MANY_DESCRIPTORS] = -EPROTO,
        [POSITIVE_STATUS] = -EPROTO,
        [REFUSAL] = -EINVAL,
        [DESCRIPTOR_WITH_REFUSAL] = -EPROTO,
        [TRUNCATED] = -EPROTO,
        [HANG_UP] = -ECONNRESET,
        [GOOD_CHANNEL] = 0,
        [ONE_EVENTFD] = -EPROTO,
    };
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char directory[] = "/tmp/qvbXXXXXX";
    int lowest = dup(0);

    close(lowest);
    CHECK(mkdtemp(directory) != NULL);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/xen", directory);
    for (int answer = 0; answer < ANSWERS; answer++) {
        struct server server = {socket(AF_UNIX, SOCK_SEQPACKET, 0), (enum answer)answer};
        struct xen xen;
        struct xen_page page = {0};
        struct xen_channel channel;
        const char *missing;
        pthread_t thread;

        CHECK(bind(server.listener, (struct sockaddr *)&address, sizeof(address)) == 0);
        CHECK(listen(server.listener, 1) == 0);
        CHECK(pthread_create(&thread, NULL, serve, &server) == 0);
        CHECK(xen_open_embedded(&xen, address.sun_path, &missing) == 0);
        if (answer >= GOOD_CHANNEL) {
            CHECK(xen_alloc_unbound(&xen, 2, &channel) == expected[answer]);
            if (expected[answer] == 0) {
                use_spoilt(&channel);
            }
            xen_close_channel(&channel);
            xen_close_channel(&channel);
        } else {
            CHECK(xen_share_page(&xen, 2, &page) == expected[answer]);
        }
        if (page.shared) {
            CHECK(page.ref == 8);
            xen_drop_page(&page);
        }
        CHECK(page.shared == NULL);
        CHECK(pthread_join(thread, NULL) == 0);
        xen_close(&xen);
        xen_close(&xen);
        close(server.listener);
        unlink(address.sun_path);
        /* No descriptor that was sent along stays open. */
        CHECK(dup(0) == lowest);
        close(lowest);
    }
    rmdir(directory);
    return 0;
}
