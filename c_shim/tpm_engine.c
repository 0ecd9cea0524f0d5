#include "tpm_engine.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

enum {
    CONTROL_TIMEOUT_MS = 5000,
    CMD_SET_LOCALITY = 5, /* swtpm's control channel */
};

void engine_open(struct tpm_engine *engine)
{
    engine->data_fd = engine->control_fd = -1;
    engine->locality = -1;
}

int engine_set_fds(struct tpm_engine *engine, int data_fd, int control_fd, int epoll_fd,
                   uint64_t key)
{
    if (engine->data_fd >= 0) {
        pump_unwatch(epoll_fd, engine->data_fd);
    }
    engine->data_fd = data_fd;
    engine->control_fd = control_fd;
    engine->locality = -1;
    engine->response_bytes = 0;
    return data_fd < 0 ? 0 : pump_watch(epoll_fd, data_fd, EPOLLIN | EPOLLRDHUP | EPOLLET, key);
}

/* Wait for a socket of the TPM's, at most so long; false where it is not ready by then. */
static bool ready(int fd, short events, int timeout_ms)
{
    struct pollfd engine = {.fd = fd, .events = events};

    return poll(&engine, 1, timeout_ms) > 0;
}

static enum engine_found set_locality(struct tpm_engine *engine, uint8_t locality)
{
    const uint8_t command[8] = {0, 0, 0, CMD_SET_LOCALITY, locality};
    uint8_t result[4];

    if (engine->locality == locality) {
        return ENGINE_PROGRESS;
    }
    if (send(engine->control_fd, command, sizeof(command), MSG_DONTWAIT | MSG_NOSIGNAL) !=
        (ssize_t)sizeof(command)) {
        return ENGINE_EOF;
    }
    if (!ready(engine->control_fd, POLLIN, CONTROL_TIMEOUT_MS)) {
        return ENGINE_DEADLINE;
    }
    if (recv(engine->control_fd, result, sizeof(result), MSG_DONTWAIT) != (ssize_t)sizeof(result)) {
        return ENGINE_EOF;
    }
    if (memcmp(result, (const uint8_t[4]){0}, sizeof(result)) != 0) {
        return ENGINE_BAD_RESPONSE;
    }
    engine->locality = locality;
    return ENGINE_PROGRESS;
}

enum engine_found engine_send(struct tpm_engine *engine, const struct tpmif_request *request,
                              uint32_t deadline_ms)
{
    enum engine_found found;

    if (engine->data_fd < 0) {
        return ENGINE_EOF;
    }
    found = set_locality(engine, request->locality);
    if (found != ENGINE_PROGRESS) {
        return found;
    }
    /* Between two commands the socket is empty, so a request fits in one piece. */
    if (send(engine->data_fd, request->payload, request->bytes, MSG_DONTWAIT | MSG_NOSIGNAL) !=
        (ssize_t)request->bytes) {
        return ENGINE_EOF;
    }
    engine->response_bytes = 0;
    engine->deadline_ns = pump_now_ns() + (uint64_t)deadline_ms * 1000000u;
    return ENGINE_PROGRESS;
}

enum engine_found engine_receive(struct tpm_engine *engine)
{
    ssize_t got = recv(engine->data_fd, engine->response + engine->response_bytes,
                       sizeof(engine->response) - engine->response_bytes, MSG_DONTWAIT);
    uint32_t announced;

    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        return pump_now_ns() >= engine->deadline_ns ? ENGINE_DEADLINE : ENGINE_WAIT;
    }
    if (got <= 0) {
        return ENGINE_EOF;
    }
    engine->response_bytes += (uint32_t)got;
    if (engine->response_bytes < TPM_HEADER_BYTES) {
        return ENGINE_PROGRESS;
    }
    announced = tpm_header_load(engine->response).bytes;
    if (announced < TPM_HEADER_BYTES || announced > sizeof(engine->response) ||
        announced < engine->response_bytes) {
        return ENGINE_BAD_RESPONSE;
    }
    return announced == engine->response_bytes ? ENGINE_RESPONSE : ENGINE_PROGRESS;
}
