#include "data_socket.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* Edges.  Room for output is asked for only while output is blocked: each answer that QEMU
   takes would be an edge otherwise, and wake the pump for nothing. */
static const uint32_t EVENTS = EPOLLIN | EPOLLRDHUP | EPOLLET;

void data_open(struct data_socket *data, int epoll_fd, uint64_t key)
{
    data->fd = -1;
    data->epoll_fd = epoll_fd;
    data->key = key;
}

int data_set_fd(struct data_socket *data, int fd)
{
    if (data->fd >= 0) {
        pump_unwatch(data->epoll_fd, data->fd);
        close(data->fd);
    }
    data->fd = fd;
    data->ready = fd >= 0;
    data->half_closed = data->hung_up = data->output_blocked = data->skipping = false;
    data->input_bytes = 0;
    data->silent_until_ns = 0;
    data->output_at = data->output_bytes = 0;
    return fd < 0 ? 0 : pump_watch(data->epoll_fd, fd, EVENTS, data->key);
}

void data_note(struct data_socket *data, uint32_t events)
{
    data->ready = true;
    /* No edge follows these: what is unread and the end itself must be read now. */
    data->half_closed |= (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    data->hung_up |= (events & (EPOLLHUP | EPOLLERR)) != 0;
}

static void expect_more_within(struct data_socket *data, uint32_t ms)
{
    data->silent_until_ns = pump_now_ns() + (uint64_t)ms * 1000000u;
}

static enum data_found receive(struct data_socket *data)
{
    uint32_t room = DATA_INPUT_BYTES - data->input_bytes;
    ssize_t got = recv(data->fd, data->input + data->input_bytes, room, MSG_DONTWAIT);

    if (got > 0) {
        data->input_bytes += (uint32_t)got;
        data->ready = (uint32_t)got == room || data->half_closed;
        expect_more_within(data, data->skipping ? DATA_SILENCE_MS : DATA_PARTIAL_MS);
        return DATA_PROGRESS;
    }
    if (got < 0 && errno == EINTR) {
        return DATA_PROGRESS;
    }
    if (got < 0 && errno == EAGAIN) {
        data->ready = false;
        return DATA_NOTHING;
    }
    return got == 0 || errno == ECONNRESET ? DATA_EOF : DATA_ERROR;
}

/* Read on, or give up what has been incomplete for too long. */
static enum data_found more(struct data_socket *data)
{
    enum data_found found = data->ready ? receive(data) : DATA_NOTHING;

    if (found == DATA_NOTHING && data->silent_until_ns && pump_now_ns() >= data->silent_until_ns) {
        data->silent_until_ns = 0;
        data->skipping = false;
        data->input_bytes = 0;
        return DATA_BAD_SIZE;
    }
    return found;
}

void data_drop(struct data_socket *data, uint32_t bytes)
{
    data->input_bytes -= bytes;
    memmove(data->input, data->input + bytes, data->input_bytes);
    data->silent_until_ns = 0;
    if (data->input_bytes > 0) {
        expect_more_within(data, DATA_PARTIAL_MS);
    }
}

static enum data_found skip(struct data_socket *data)
{
    uint32_t part = data->input_bytes;

    if (part > data->skip_bytes) {
        part = (uint32_t)data->skip_bytes;
    }
    data_drop(data, part);
    data->skip_bytes -= part;
    if (data->skip_bytes == 0) {
        data->skipping = false;
        return DATA_BAD_SIZE;
    }
    expect_more_within(data, DATA_SILENCE_MS);
    return more(data);
}

enum data_found data_next(struct data_socket *data, uint32_t most_bytes, struct tpm_header *header)
{
    if (data->skipping) {
        return data->input_bytes > 0 ? skip(data) : more(data);
    }
    if (data->input_bytes < TPM_HEADER_BYTES) {
        return more(data);
    }
    *header = tpm_header_load(data->input);
    if (header->bytes < TPM_HEADER_BYTES || header->bytes > most_bytes) {
        data->skipping = true;
        /* A size below a header's says nothing of how much was written with it. */
        data->skip_bytes = header->bytes < TPM_HEADER_BYTES ? UINT64_MAX : header->bytes;
        return skip(data);
    }
    if (data->input_bytes < header->bytes) {
        return more(data);
    }
    return DATA_COMMAND;
}

void data_answer(struct data_socket *data, const uint8_t *answer, uint32_t bytes)
{
    if (answer != data->output) {
        memcpy(data->output, answer, bytes);
    }
    data->output_at = 0;
    data->output_bytes = bytes;
    if (data->input_bytes <= DATA_TAIL_BYTES && !data->ready) {
        data->input_bytes = 0;
        data->silent_until_ns = 0;
    }
}

static void block_output(struct data_socket *data, bool blocked)
{
    struct epoll_event event = {.events = EVENTS, .data.u64 = data->key};

    if (blocked != data->output_blocked) {
        data->output_blocked = blocked;
        event.events |= blocked ? (uint32_t)EPOLLOUT : 0;
        (void)epoll_ctl(data->epoll_fd, EPOLL_CTL_MOD, data->fd, &event);
    }
}

enum data_found data_send(struct data_socket *data)
{
    while (data->output_at < data->output_bytes) {
        ssize_t sent = send(data->fd, data->output + data->output_at,
                            data->output_bytes - data->output_at, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0 && errno == EAGAIN) {
            block_output(data, true);
            return DATA_NOTHING;
        }
        if (sent < 0) {
            return errno == EPIPE || errno == ECONNRESET ? DATA_EOF : DATA_ERROR;
        }
        data->output_at += (uint32_t)sent;
    }
    data->output_at = data->output_bytes = 0;
    block_output(data, false);
    return DATA_PROGRESS;
}

int data_wait_ms(const struct data_socket *data, int most_ms)
{
    return data->silent_until_ns ? pump_ms_until(data->silent_until_ns, most_ms) : -1;
}
