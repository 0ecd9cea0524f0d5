#include "pump_frontend.h"

#include "data_socket.h"
#include "exchange.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum {
    KEY_BELL,
    KEY_DATA,
    KEY_RING,
};

enum {
    RECHECK_MS = 1000, /* a wake-up may be lost: look at the page this often while waiting */
};

struct answer {
    uint8_t header[TPM_HEADER_BYTES];
};

struct frontend_pump {
    struct pump_bell bell;
    int epoll_fd;

    /* Configuration. */
    enum frontend_mode mode;
    uint32_t cancel_grace_ms, buffer_bytes;
    struct pump_deadlines deadlines;
    uint16_t command_tags[PUMP_TAGS_MAX];
    uint32_t command_tags_count;
    struct answer answers[FRONTEND_ANSWERS];

    /* QEMU's side, which outlives a run: a command may come in pieces. */
    struct data_socket data;

    /* The ring. */
    struct exchange ring;
    bool in_flight; /* QEMU waits for what is on the page */
    bool graced;    /* the deadline has passed, the backend was told to cancel */
    _Atomic uint8_t locality;

    struct {
        _Atomic uint64_t commands, responses, refused, errors, timeouts, cancels, events, spurious;
        _Atomic uint64_t bytes_in, bytes_out;
        _Atomic uint32_t last_ordinal, last_response_code;
        _Atomic uint64_t ordinals[PUMP_ORDINALS + 1];
        atomic_int in_flight;
    } stats;
};

/* What a step of the loop found; STEP_EXIT and above stand for an enum frontend_exit. */
enum step {
    STEP_IDLE, /* nothing to do: wait */
    STEP_DONE, /* something was done: look again */
    STEP_EXIT,
};

struct frontend_pump *frontend_pump_new(void)
{
    struct frontend_pump *pump = calloc(1, sizeof(*pump));

    if (!pump) {
        return NULL;
    }
    pump->buffer_bytes = TPMIF_PAYLOAD_MAX_BYTES;
    pump->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    data_open(&pump->data, pump->epoll_fd, KEY_DATA);
    pump->bell.fd = -1;
    if (pump->epoll_fd < 0 || pump_bell_open(&pump->bell) != 0 ||
        pump_watch(pump->epoll_fd, pump->bell.fd, EPOLLIN, KEY_BELL) != 0) {
        frontend_pump_free(pump);
        return NULL;
    }
    return pump;
}

void frontend_pump_free(struct frontend_pump *pump)
{
    (void)frontend_pump_set_data_fd(pump, -1);
    if (pump->bell.fd >= 0) {
        close(pump->bell.fd);
    }
    if (pump->epoll_fd >= 0) {
        close(pump->epoll_fd);
    }
    free(pump);
}

int frontend_pump_set_deadlines(struct frontend_pump *pump, uint32_t default_ms,
                                uint32_t cancel_grace_ms, const uint32_t *ordinals,
                                const uint32_t *deadlines_ms, uint32_t count)
{
    pump->cancel_grace_ms = cancel_grace_ms;
    return pump_deadlines_set(&pump->deadlines, default_ms, ordinals, deadlines_ms, count);
}

int frontend_pump_set_tags(struct frontend_pump *pump, const uint16_t *command_tags,
                           uint32_t commands, const uint16_t *response_tags, uint32_t responses,
                           const uint16_t *error_tags, uint32_t errors)
{
    if (commands > PUMP_TAGS_MAX) {
        return -E2BIG;
    }
    memcpy(pump->command_tags, command_tags, commands * sizeof(uint16_t));
    pump->command_tags_count = commands;
    return exchange_set_tags(&pump->ring, response_tags, responses, error_tags, errors);
}

void frontend_pump_set_answer(struct frontend_pump *pump, enum frontend_answer answer,
                              const uint8_t *header)
{
    memcpy(pump->answers[answer].header, header, TPM_HEADER_BYTES);
}

void frontend_pump_set_buffer_size(struct frontend_pump *pump, uint32_t bytes)
{
    pump->buffer_bytes = bytes;
}

void frontend_pump_set_mode(struct frontend_pump *pump, enum frontend_mode mode)
{
    pump->mode = mode;
}

int frontend_pump_set_data_fd(struct frontend_pump *pump, int fd)
{
    return data_set_fd(&pump->data, fd);
}

int frontend_pump_attach_ring(struct frontend_pump *pump, struct xen_page *page,
                              struct xen_channel *channel)
{
    return exchange_attach(&pump->ring, page, channel, pump->epoll_fd, KEY_RING);
}

void frontend_pump_detach_ring(struct frontend_pump *pump)
{
    exchange_detach(&pump->ring, pump->epoll_fd);
}

/* QEMU's socket. */

static void answer_qemu(struct frontend_pump *pump, enum frontend_answer answer)
{
    data_answer(&pump->data, pump->answers[answer].header, TPM_HEADER_BYTES);
}

static int exit_for(enum data_found found)
{
    return STEP_EXIT + (found == DATA_EOF ? FRONTEND_DATA_EOF : FRONTEND_DATA_ERROR);
}

static int send_output(struct frontend_pump *pump)
{
    uint32_t before = pump->data.output_at;
    uint32_t queued = pump->data.output_bytes;
    enum data_found found = data_send(&pump->data);

    pump_count(&pump->stats.bytes_out,
               found == DATA_PROGRESS ? queued - before : pump->data.output_at - before);
    if (found == DATA_NOTHING) {
        return STEP_IDLE;
    }
    return found == DATA_PROGRESS ? STEP_DONE : exit_for(found);
}

/* A whole command is in the buffer: send it on its way, or answer it here. */
static int serve(struct frontend_pump *pump, struct tpm_header header)
{
    pump_count(&pump->stats.commands, 1);
    pump_count(&pump->stats.ordinals[header.code < PUMP_ORDINALS ? header.code : PUMP_ORDINALS], 1);
    atomic_store_explicit(&pump->stats.last_ordinal, header.code, memory_order_relaxed);
    if (pump->mode == FRONTEND_REFUSE) {
        pump_count(&pump->stats.refused, 1);
        answer_qemu(pump, FRONTEND_ANSWER_REFUSAL);
    } else if (exchange_owed(&pump->ring)) {
        /* P5: nothing new onto a page whose late answer could be taken for it. */
        pump_count(&pump->stats.refused, 1);
        answer_qemu(pump, FRONTEND_ANSWER_FAILURE);
    } else if (!pump_has_tag(pump->command_tags, pump->command_tags_count, header.tag)) {
        pump_count(&pump->stats.refused, 1);
        answer_qemu(pump, FRONTEND_ANSWER_BAD_TAG);
    } else {
        int status;

        /* A cancel that came before the command was for an earlier one. */
        atomic_store(&pump->bell.cancel, 0);
        pump->graced = false;
        pump->in_flight = true;
        atomic_store_explicit(&pump->stats.in_flight, 1, memory_order_relaxed);
        status = exchange_submit(&pump->ring, pump->data.input, header.bytes,
                                 atomic_load_explicit(&pump->locality, memory_order_relaxed),
                                 pump_deadline_ms(&pump->deadlines, header.code));
        data_drop(&pump->data, header.bytes);
        return status == 0 ? STEP_DONE : STEP_EXIT + FRONTEND_CHANNEL_ERROR;
    }
    data_drop(&pump->data, header.bytes);
    return STEP_DONE;
}

static int read_command(struct frontend_pump *pump)
{
    struct tpm_header header;
    enum data_found found = data_next(&pump->data, pump->buffer_bytes, &header);

    switch (found) {
    case DATA_NOTHING:
        return STEP_IDLE;
    case DATA_PROGRESS:
        return STEP_DONE;
    case DATA_COMMAND:
        pump_count(&pump->stats.bytes_in, header.bytes);
        return serve(pump, header);
    case DATA_BAD_SIZE:
        pump_count(&pump->stats.commands, 1);
        pump_count(&pump->stats.refused, 1);
        answer_qemu(pump, FRONTEND_ANSWER_BAD_SIZE);
        return STEP_DONE;
    default:
        return exit_for(found);
    }
}

/* The ring. */

static void landed(struct frontend_pump *pump)
{
    pump->in_flight = false;
    atomic_store_explicit(&pump->stats.in_flight, 0, memory_order_relaxed);
}

/* QEMU gets a failure now; what the backend still owes is dropped, and not begun any more. */
static void give_up(struct frontend_pump *pump)
{
    exchange_abandon(&pump->ring);
    landed(pump);
    pump_count(&pump->stats.errors, 1);
    answer_qemu(pump, FRONTEND_ANSWER_FAILURE);
}

static int cancel_on_page(struct frontend_pump *pump)
{
    int asked = exchange_cancel(&pump->ring);

    pump_count(&pump->stats.cancels, asked == 1);
    return asked < 0 ? asked : 0;
}

static int past_deadline(struct frontend_pump *pump)
{
    if (pump->graced) {
        give_up(pump);
        return STEP_EXIT + FRONTEND_DEADLINE;
    }
    pump->graced = true;
    pump_count(&pump->stats.timeouts, 1);
    exchange_set_deadline(&pump->ring, pump->cancel_grace_ms);
    return cancel_on_page(pump) == 0 ? STEP_DONE : STEP_EXIT + FRONTEND_CHANNEL_ERROR;
}

static int await_response(struct frontend_pump *pump)
{
    int bytes;

    if (atomic_load_explicit(&pump->bell.cancel, memory_order_relaxed) &&
        atomic_exchange(&pump->bell.cancel, 0) && cancel_on_page(pump) != 0) {
        return STEP_EXIT + FRONTEND_CHANNEL_ERROR;
    }
    bytes = exchange_look(&pump->ring, pump->data.output);
    if (bytes == 0) {
        return exchange_past_deadline(&pump->ring) ? past_deadline(pump) : STEP_IDLE;
    }
    landed(pump);
    pump_count(&pump->stats.responses, 1);
    if (bytes > 0 && (uint32_t)bytes <= pump->buffer_bytes) {
        data_answer(&pump->data, pump->data.output, (uint32_t)bytes);
        atomic_store_explicit(&pump->stats.last_response_code,
                              tpm_header_load(pump->data.output).code, memory_order_relaxed);
        return STEP_DONE;
    }
    pump_count(&pump->stats.errors, 1);
    answer_qemu(pump, bytes == -ECANCELED ? FRONTEND_ANSWER_CANCELLED : FRONTEND_ANSWER_FAILURE);
    return bytes == -EBADMSG ? STEP_EXIT + FRONTEND_BAD_RESPONSE : STEP_DONE;
}

/* The loop. */

static int check_stop(struct frontend_pump *pump)
{
    unsigned stop = atomic_load_explicit(&pump->bell.stop, memory_order_relaxed);

    if (!stop || (stop == PUMP_STOP_DRAIN && pump->in_flight)) {
        return STEP_IDLE;
    }
    if (pump->in_flight) {
        give_up(pump);
    }
    return STEP_EXIT + FRONTEND_STOPPED;
}

/* Whether commands are taken from QEMU now. */
static bool reads(const struct frontend_pump *pump)
{
    return pump->mode == FRONTEND_REFUSE || (pump->mode == FRONTEND_FORWARD && pump->ring.page);
}

static int step(struct frontend_pump *pump)
{
    int found = check_stop(pump);

    if (found != STEP_IDLE) {
        return found;
    }
    if (pump->in_flight) {
        return await_response(pump);
    }
    if (pump->data.output_bytes > 0) {
        return send_output(pump);
    }
    if (pump->data.fd < 0) {
        return STEP_IDLE;
    }
    if (!reads(pump)) {
        /* Commands are held; QEMU's death is not. */
        return pump->data.hung_up ? STEP_EXIT + FRONTEND_DATA_EOF : STEP_IDLE;
    }
    return read_command(pump);
}

static int wait_ms(const struct frontend_pump *pump)
{
    int ms = -1;

    if (pump->in_flight) {
        ms = pump_ms_until(pump->ring.deadline_ns, RECHECK_MS);
    } else if (reads(pump)) {
        ms = data_wait_ms(&pump->data, RECHECK_MS);
    }
    if (pump->ring.line.muted_until_ns) {
        int unmute = pump_ms_until(pump->ring.line.muted_until_ns, RECHECK_MS);

        ms = ms < 0 || unmute < ms ? unmute : ms;
    }
    return ms;
}

/* Take the events that came; an event that finds the page unchanged is a spurious one. */
static int note_ring(struct frontend_pump *pump)
{
    bool useful = false;
    int status = pump_line_event(&pump->ring.line);

    pump_count(&pump->stats.events, 1);
    if (pump->in_flight) {
        uint8_t state = tpmif_state(pump->ring.page);

        useful = state == TPMIF_STATE_FINISH || state == TPMIF_STATE_IDLE;
    }
    if (!useful) {
        pump_count(&pump->stats.spurious, 1);
    }
    return status ? status : pump_line_done(&pump->ring.line, !useful, pump->epoll_fd, KEY_RING);
}

static int wait_for_events(struct frontend_pump *pump)
{
    struct epoll_event events[3];
    int count = epoll_wait(pump->epoll_fd, events, 3, wait_ms(pump));
    int status = pump_line_unmute(&pump->ring.line, pump->epoll_fd, KEY_RING);

    for (int i = 0; i < count && status == 0; i++) {
        switch (events[i].data.u64) {
        case KEY_BELL:
            pump_bell_silence(&pump->bell);
            break;
        case KEY_DATA:
            data_note(&pump->data, events[i].events);
            break;
        default:
            status = note_ring(pump);
        }
    }
    return status;
}

int frontend_pump_run(struct frontend_pump *pump)
{
    int found;

    do {
        found = step(pump);
        if (found == STEP_IDLE && wait_for_events(pump) != 0) {
            found = STEP_EXIT + FRONTEND_CHANNEL_ERROR;
        }
    } while (found < STEP_EXIT);
    if (found == STEP_EXIT + FRONTEND_CHANNEL_ERROR && pump->in_flight) {
        give_up(pump);
    }
    if (pump->data.output_bytes > 0 && pump->data.fd >= 0) {
        /* The answer that came with the end; what does not fit now goes out in the next run. */
        (void)send_output(pump);
    }
    if (found == STEP_EXIT + FRONTEND_STOPPED) {
        atomic_store(&pump->bell.stop, 0);
    }
    return (int)found - STEP_EXIT;
}

int frontend_pump_transact(struct frontend_pump *pump, const uint8_t *request,
                           uint32_t request_bytes, uint8_t locality, uint32_t deadline,
                           uint8_t *response)
{
    int result;

    if (!pump->ring.page) {
        return -ENOTCONN;
    }
    if (exchange_owed(&pump->ring)) {
        return -EBUSY;
    }
    if (request_bytes == 0 || request_bytes > TPMIF_PAYLOAD_MAX_BYTES) {
        return -EMSGSIZE;
    }
    result = exchange_submit(&pump->ring, request, request_bytes, locality, deadline);
    while (result == 0) {
        struct epoll_event event;

        result = exchange_look(&pump->ring, response);
        if (result != 0) {
            return result;
        }
        if (exchange_past_deadline(&pump->ring)) {
            result = -ETIMEDOUT;
        } else if (atomic_load(&pump->bell.stop) & PUMP_STOP_NOW) {
            result = -ECANCELED;
        } else if (epoll_wait(pump->epoll_fd, &event, 1,
                              pump_ms_until(pump->ring.deadline_ns, RECHECK_MS)) > 0) {
            if (event.data.u64 == KEY_BELL) {
                pump_bell_silence(&pump->bell);
            } else if (event.data.u64 == KEY_DATA) {
                data_note(&pump->data, event.events);
            } else {
                result = pump_line_event(&pump->ring.line);
                if (result == 0) {
                    result = pump_line_done(&pump->ring.line, false, pump->epoll_fd, KEY_RING);
                }
            }
        }
    }
    exchange_abandon(&pump->ring);
    return result;
}

/* Any time. */

void frontend_pump_request_stop(struct frontend_pump *pump, enum pump_stop stop)
{
    atomic_fetch_or(&pump->bell.stop, stop);
    pump_bell_ring(&pump->bell);
}

void frontend_pump_reset_stop(struct frontend_pump *pump)
{
    atomic_store(&pump->bell.stop, 0);
}

uint64_t frontend_pump_ping(struct frontend_pump *pump)
{
    return pump_bell_ping(&pump->bell);
}

void frontend_pump_cancel(struct frontend_pump *pump)
{
    atomic_store(&pump->bell.cancel, 1);
    pump_bell_ring(&pump->bell);
}

void frontend_pump_set_locality(struct frontend_pump *pump, uint8_t locality)
{
    atomic_store_explicit(&pump->locality, locality, memory_order_relaxed);
}

bool frontend_pump_ring_busy(struct frontend_pump *pump)
{
    return exchange_busy(&pump->ring);
}

void frontend_pump_stats(struct frontend_pump *pump, struct frontend_stats *stats)
{
    *stats = (struct frontend_stats){
        .commands = pump->stats.commands,
        .responses = pump->stats.responses,
        .refused = pump->stats.refused,
        .errors = pump->stats.errors,
        .timeouts = pump->stats.timeouts,
        .cancels = pump->stats.cancels,
        .events = pump->stats.events,
        .spurious = pump->stats.spurious,
        .bytes_in = pump->stats.bytes_in,
        .bytes_out = pump->stats.bytes_out,
        .last_ordinal = pump->stats.last_ordinal,
        .last_response_code = pump->stats.last_response_code,
        .in_flight = pump->stats.in_flight,
    };
}

void frontend_pump_ordinals(struct frontend_pump *pump, uint64_t *counts)
{
    for (uint32_t i = 0; i <= PUMP_ORDINALS; i++) {
        counts[i] = atomic_load_explicit(&pump->stats.ordinals[i], memory_order_relaxed);
    }
}
