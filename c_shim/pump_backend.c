#include "pump_backend.h"

#include "tpm_engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum {
    KEY_BELL = 1000,
    KEY_ENGINE,
};

enum { LOCALITIES = 5 };

enum { NO_SLOT = -1 };

/* Of the command in hand. */
enum phase {
    PHASE_NONE,
    PHASE_FETCHED, /* checked, not yet sent */
    PHASE_SENT,    /* the TPM works */
};

struct slot {
    struct tpmif_page *page; /* NULL: free */
    struct pump_line line;
    struct {
        _Atomic uint64_t commands, refused, events, spurious, cancels;
    } stats;
};

struct backend_pump {
    struct pump_bell bell;
    int epoll_fd;

    /* Configuration. */
    uint16_t command_tags[PUMP_TAGS_MAX];
    uint32_t read_only[PUMP_TABLE_MAX];
    uint32_t command_tags_count, read_only_count;
    struct pump_deadlines deadlines;
    uint32_t settle_ms;
    uint8_t answers[BACKEND_ANSWERS][TPM_HEADER_BYTES];

    /* The TPM. */
    struct tpm_engine engine;
    bool clean;
    uint64_t settled_ns; /* 0: nothing to settle */

    /* The command in hand. */
    enum phase phase;
    int asker; /* NO_SLOT once it was removed */
    struct tpmif_request request;

    struct slot slots[BACKEND_SLOTS];
    int next; /* whose turn it is */
    atomic_int failed_slot;

    struct {
        _Atomic uint64_t commands, mutating, refused;
        _Atomic uint32_t last_ordinal, last_response_code;
        _Atomic uint32_t last_change_ordinal, last_change_code; /* of those not read-only */
        atomic_int in_flight_slot;
    } stats;
};

/* What a step of the loop found; STEP_EXIT and above stand for an enum backend_exit. */
enum step {
    STEP_IDLE,
    STEP_DONE,
    STEP_EXIT,
};

struct backend_pump *backend_pump_new(void)
{
    struct backend_pump *pump = calloc(1, sizeof(*pump));

    if (!pump) {
        return NULL;
    }
    engine_open(&pump->engine);
    pump->asker = NO_SLOT;
    atomic_init(&pump->failed_slot, NO_SLOT);
    atomic_init(&pump->stats.in_flight_slot, NO_SLOT);
    pump->bell.fd = -1;
    pump->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (pump->epoll_fd < 0 || pump_bell_open(&pump->bell) != 0 ||
        pump_watch(pump->epoll_fd, pump->bell.fd, EPOLLIN, KEY_BELL) != 0) {
        backend_pump_free(pump);
        return NULL;
    }
    return pump;
}

void backend_pump_free(struct backend_pump *pump)
{
    if (pump->bell.fd >= 0) {
        close(pump->bell.fd);
    }
    if (pump->epoll_fd >= 0) {
        close(pump->epoll_fd);
    }
    free(pump);
}

int backend_pump_set_tables(struct backend_pump *pump, const uint16_t *command_tags, uint32_t tags,
                            const uint32_t *read_only_ordinals, uint32_t ordinals)
{
    if (tags > PUMP_TAGS_MAX || ordinals > PUMP_TABLE_MAX) {
        return -E2BIG;
    }
    memcpy(pump->command_tags, command_tags, tags * sizeof(*command_tags));
    memcpy(pump->read_only, read_only_ordinals, ordinals * sizeof(*read_only_ordinals));
    pump->command_tags_count = tags;
    pump->read_only_count = ordinals;
    return 0;
}

void backend_pump_set_answer(struct backend_pump *pump, enum backend_answer answer,
                             const uint8_t *header)
{
    memcpy(pump->answers[answer], header, TPM_HEADER_BYTES);
}

void backend_pump_set_times(struct backend_pump *pump, uint32_t default_ms, uint32_t settle_ms)
{
    pump->deadlines.default_ms = default_ms;
    pump->settle_ms = settle_ms;
}

int backend_pump_set_deadlines(struct backend_pump *pump, const uint32_t *ordinals,
                               const uint32_t *deadlines_ms, uint32_t count)
{
    return pump_deadlines_set(&pump->deadlines, pump->deadlines.default_ms, ordinals, deadlines_ms,
                              count);
}

bool backend_pump_busy(const struct backend_pump *pump)
{
    return pump->phase == PHASE_SENT;
}

int backend_pump_set_engine(struct backend_pump *pump, int data_fd, int control_fd)
{
    return engine_set_fds(&pump->engine, data_fd, control_fd, pump->epoll_fd, KEY_ENGINE);
}

void backend_pump_set_clean(struct backend_pump *pump, bool clean)
{
    pump->clean = clean;
    pump->settled_ns = 0;
}

int backend_pump_add_frontend(struct backend_pump *pump, struct xen_page *page,
                              struct xen_channel *channel)
{
    for (int i = 0; i < BACKEND_SLOTS; i++) {
        struct slot *slot = &pump->slots[i];

        if (!slot->page) {
            int status;

            memset(&slot->stats, 0, sizeof(slot->stats));
            status = pump_line_open(&slot->line, channel, pump->epoll_fd, (uint64_t)i);
            slot->page = status == 0 ? page->shared : NULL;
            return status == 0 ? i : status;
        }
    }
    return -ENOSPC;
}

void backend_pump_remove_frontend(struct backend_pump *pump, int slot)
{
    pump_line_close(&pump->slots[slot].line, pump->epoll_fd);
    pump->slots[slot].page = NULL;
    if (pump->asker == slot) {
        pump->asker = NO_SLOT;
        atomic_store(&pump->stats.in_flight_slot, NO_SLOT);
        if (pump->phase == PHASE_FETCHED) {
            pump->phase = PHASE_NONE;
        }
    }
}

/* A frontend's page. */

static int answer_slot(struct backend_pump *pump, int at, const uint8_t *response, uint32_t bytes)
{
    struct slot *slot = &pump->slots[at];
    int status;

    tpmif_answer(slot->page, pump->request.payload_offset, response, bytes);
    status = xen_notify(slot->line.channel);
    if (status != 0) {
        atomic_store(&pump->failed_slot, at);
        return STEP_EXIT + BACKEND_CHANNEL_ERROR;
    }
    return STEP_DONE;
}

static int refuse_slot(struct backend_pump *pump, int at, enum backend_answer answer)
{
    pump_count(&pump->slots[at].stats.refused, 1);
    pump_count(&pump->stats.refused, 1);
    /* A request with so many extra pages that no answer fits gets it at the usual place. */
    if (pump->request.payload_offset + TPM_HEADER_BYTES > TPMIF_PAGE_BYTES) {
        pump->request.payload_offset = TPMIF_PAYLOAD_OFFSET;
    }
    return answer_slot(pump, at, pump->answers[answer], TPM_HEADER_BYTES);
}

/* Fetch the request on the page and check it; what is wrong is answered here. */
static int fetch_from(struct backend_pump *pump, int at)
{
    struct slot *slot = &pump->slots[at];
    struct tpm_header header;

    if (tpmif_fetch(slot->page, &pump->request) != 0) {
        return refuse_slot(pump, at, BACKEND_ANSWER_BAD_SIZE);
    }
    if (pump->request.bytes == 0) {
        return answer_slot(pump, at, pump->request.payload, 0);
    }
    if (pump->request.bytes < TPM_HEADER_BYTES) {
        return refuse_slot(pump, at, BACKEND_ANSWER_BAD_SIZE);
    }
    header = tpm_header_load(pump->request.payload);
    if (header.bytes != pump->request.bytes) {
        return refuse_slot(pump, at, BACKEND_ANSWER_BAD_SIZE);
    }
    if (!pump_has_tag(pump->command_tags, pump->command_tags_count, header.tag)) {
        return refuse_slot(pump, at, BACKEND_ANSWER_BAD_TAG);
    }
    if (pump->request.locality >= LOCALITIES) {
        return refuse_slot(pump, at, BACKEND_ANSWER_BAD_LOCALITY);
    }
    pump_count(&slot->stats.commands, 1);
    pump_count(&pump->stats.commands, 1);
    atomic_store_explicit(&pump->stats.last_ordinal, header.code, memory_order_relaxed);
    atomic_store_explicit(&pump->stats.in_flight_slot, at, memory_order_relaxed);
    pump->asker = at;
    pump->phase = PHASE_FETCHED;
    return STEP_DONE;
}

/* A frontend took back what it submitted, before it was fetched. */
static int accept_cancel(struct backend_pump *pump, int at)
{
    struct slot *slot = &pump->slots[at];

    if (!tpmif_accept_cancel(slot->page)) {
        return 0;
    }
    pump_count(&slot->stats.cancels, 1);
    return xen_notify(slot->line.channel);
}

/* Give the next frontend that submitted something its turn. */
static int pick(struct backend_pump *pump)
{
    for (int i = 0; i < BACKEND_SLOTS; i++) {
        int at = (pump->next + i) % BACKEND_SLOTS;
        struct slot *slot = &pump->slots[at];
        uint8_t state = slot->page ? tpmif_state(slot->page) : TPMIF_STATE_IDLE;

        if (state == TPMIF_STATE_SUBMIT && !slot->line.muted_until_ns) {
            pump->next = (at + 1) % BACKEND_SLOTS;
            return fetch_from(pump, at);
        }
        if (state == TPMIF_STATE_CANCEL && accept_cancel(pump, at) != 0) {
            atomic_store(&pump->failed_slot, at);
            return STEP_EXIT + BACKEND_CHANNEL_ERROR;
        }
    }
    return STEP_IDLE;
}

/* The TPM. */

static int exit_for(enum engine_found found)
{
    switch (found) {
    case ENGINE_DEADLINE:
        return STEP_EXIT + BACKEND_ENGINE_DEADLINE;
    case ENGINE_BAD_RESPONSE:
        return STEP_EXIT + BACKEND_ENGINE_BAD_RESPONSE;
    default:
        return STEP_EXIT + BACKEND_ENGINE_EOF;
    }
}

static int send_request(struct backend_pump *pump)
{
    uint32_t ordinal = tpm_header_load(pump->request.payload).code;
    bool mutating = pump_find(pump->read_only, pump->read_only_count, ordinal) < 0;
    enum engine_found found;

    if (mutating && pump->clean) {
        return STEP_EXIT + BACKEND_MUTATING;
    }
    found = engine_send(&pump->engine, &pump->request, pump_deadline_ms(&pump->deadlines, ordinal));
    if (found != ENGINE_PROGRESS) {
        return exit_for(found);
    }
    if (mutating) {
        pump_count(&pump->stats.mutating, 1);
        pump->settled_ns = UINT64_MAX; /* not before the response */
    }
    pump->phase = PHASE_SENT;
    /* Nothing to read yet, so there is no point in looking. */
    return STEP_IDLE;
}

static int deliver(struct backend_pump *pump)
{
    uint32_t offset = pump->request.payload_offset;
    uint32_t ordinal = tpm_header_load(pump->request.payload).code;
    uint32_t code = tpm_header_load(pump->engine.response).code;
    int asker = pump->asker;

    atomic_store_explicit(&pump->stats.last_response_code, code, memory_order_relaxed);
    if (pump_find(pump->read_only, pump->read_only_count, ordinal) < 0) {
        atomic_store_explicit(&pump->stats.last_change_ordinal, ordinal, memory_order_relaxed);
        atomic_store_explicit(&pump->stats.last_change_code, code, memory_order_relaxed);
    }
    atomic_store_explicit(&pump->stats.in_flight_slot, NO_SLOT, memory_order_relaxed);
    pump->phase = PHASE_NONE;
    pump->asker = NO_SLOT;
    if (pump->settled_ns) {
        pump->settled_ns = pump_now_ns() + (uint64_t)pump->settle_ms * 1000000u;
    }
    if (asker == NO_SLOT) {
        return STEP_DONE;
    }
    if (offset + pump->engine.response_bytes > TPMIF_PAGE_BYTES) {
        return refuse_slot(pump, asker, BACKEND_ANSWER_BAD_SIZE);
    }
    return answer_slot(pump, asker, pump->engine.response, pump->engine.response_bytes);
}

static int receive_response(struct backend_pump *pump)
{
    enum engine_found found = engine_receive(&pump->engine);

    switch (found) {
    case ENGINE_WAIT:
        return STEP_IDLE;
    case ENGINE_PROGRESS:
        return STEP_DONE;
    case ENGINE_RESPONSE:
        return deliver(pump);
    default:
        return exit_for(found);
    }
}

void backend_pump_fail_in_flight(struct backend_pump *pump, const uint8_t *header)
{
    int asker = pump->asker;

    pump->phase = PHASE_NONE;
    pump->asker = NO_SLOT;
    pump->engine.response_bytes = 0;
    atomic_store(&pump->stats.in_flight_slot, NO_SLOT);
    if (asker != NO_SLOT) {
        (void)answer_slot(pump, asker, header, TPM_HEADER_BYTES);
    }
}

/* The loop. */

static int step(struct backend_pump *pump)
{
    unsigned stop = atomic_load_explicit(&pump->bell.stop, memory_order_relaxed);

    if ((stop & PUMP_STOP_NOW) || (stop && pump->phase != PHASE_SENT)) {
        return STEP_EXIT + BACKEND_STOPPED;
    }
    switch (pump->phase) {
    case PHASE_FETCHED:
        return send_request(pump);
    case PHASE_SENT:
        return receive_response(pump);
    default:
        break;
    }
    if (pump->settled_ns && pump_now_ns() >= pump->settled_ns) {
        pump->settled_ns = 0;
        return STEP_EXIT + BACKEND_SETTLED;
    }
    return pick(pump);
}

static int sooner(int a_ms, int b_ms)
{
    return a_ms < 0 || b_ms < a_ms ? b_ms : a_ms;
}

static int wait_ms(const struct backend_pump *pump)
{
    const int most_ms = 60000;
    int ms = -1;

    if (pump->phase == PHASE_SENT) {
        ms = pump_ms_until(pump->engine.deadline_ns, most_ms);
    } else if (pump->settled_ns) {
        ms = pump_ms_until(pump->settled_ns, most_ms);
    }
    for (int i = 0; i < BACKEND_SLOTS; i++) {
        if (pump->slots[i].page && pump->slots[i].line.muted_until_ns) {
            ms = sooner(ms, pump_ms_until(pump->slots[i].line.muted_until_ns, most_ms));
        }
    }
    return ms;
}

static int note_slot(struct backend_pump *pump, int at)
{
    struct slot *slot = &pump->slots[at];
    bool useful;
    int status = pump_line_event(&slot->line);
    uint8_t state = tpmif_state(slot->page);

    /* A command in the TPM's hand is not cancelled: swtpm looks at nothing until it is done. */
    useful = at != pump->asker && (state == TPMIF_STATE_SUBMIT || state == TPMIF_STATE_CANCEL);
    if (status == 0 && state == TPMIF_STATE_CANCEL && at != pump->asker) {
        /* Not only in its turn: the TPM may be at work for another for a long time. */
        status = accept_cancel(pump, at);
    }
    pump_count(&slot->stats.events, 1);
    if (!useful) {
        pump_count(&slot->stats.spurious, 1);
    }
    if (status == 0) {
        status = pump_line_done(&slot->line, !useful, pump->epoll_fd, (uint64_t)at);
    }
    if (status != 0) {
        atomic_store(&pump->failed_slot, at);
    }
    return status;
}

static int unmute_slots(struct backend_pump *pump)
{
    for (int i = 0; i < BACKEND_SLOTS; i++) {
        if (pump->slots[i].page &&
            pump_line_unmute(&pump->slots[i].line, pump->epoll_fd, (uint64_t)i) != 0) {
            atomic_store(&pump->failed_slot, i);
            return -EIO;
        }
    }
    return 0;
}

static int wait_for_events(struct backend_pump *pump)
{
    struct epoll_event events[BACKEND_SLOTS + 2];
    int count = epoll_wait(pump->epoll_fd, events, BACKEND_SLOTS + 2, wait_ms(pump));
    int status = unmute_slots(pump);

    for (int i = 0; i < count && status == 0; i++) {
        if (events[i].data.u64 == KEY_BELL) {
            pump_bell_silence(&pump->bell);
        } else if (events[i].data.u64 < BACKEND_SLOTS) {
            status = note_slot(pump, (int)events[i].data.u64);
        } else if (pump->phase != PHASE_SENT) {
            /* An idle TPM says nothing; only its death is news. */
            return STEP_EXIT + BACKEND_ENGINE_EOF;
        }
    }
    return status == 0 ? STEP_DONE : STEP_EXIT + BACKEND_CHANNEL_ERROR;
}

int backend_pump_run(struct backend_pump *pump)
{
    int found;

    atomic_store(&pump->failed_slot, NO_SLOT);
    do {
        found = step(pump);
        if (found == STEP_IDLE) {
            found = wait_for_events(pump);
        }
    } while (found < STEP_EXIT);
    if (found == STEP_EXIT + BACKEND_STOPPED) {
        atomic_store(&pump->bell.stop, 0);
    }
    return found - STEP_EXIT;
}

/* Any time. */

void backend_pump_request_stop(struct backend_pump *pump, enum pump_stop stop)
{
    atomic_fetch_or(&pump->bell.stop, stop);
    pump_bell_ring(&pump->bell);
}

void backend_pump_reset_stop(struct backend_pump *pump)
{
    atomic_store(&pump->bell.stop, 0);
}

uint64_t backend_pump_ping(struct backend_pump *pump)
{
    return pump_bell_ping(&pump->bell);
}

void backend_pump_stats(struct backend_pump *pump, struct backend_stats *stats)
{
    *stats = (struct backend_stats){
        .commands = pump->stats.commands,
        .mutating = pump->stats.mutating,
        .refused = pump->stats.refused,
        .last_ordinal = pump->stats.last_ordinal,
        .last_response_code = pump->stats.last_response_code,
        .last_change_ordinal = pump->stats.last_change_ordinal,
        .last_change_code = pump->stats.last_change_code,
        .in_flight_slot = pump->stats.in_flight_slot,
        .failed_slot = pump->failed_slot,
    };
}

void backend_pump_slot_stats(struct backend_pump *pump, int at, struct backend_slot_stats *stats)
{
    const struct slot *slot = &pump->slots[at];

    *stats = (struct backend_slot_stats){
        .commands = slot->stats.commands,
        .refused = slot->stats.refused,
        .events = slot->stats.events,
        .spurious = slot->stats.spurious,
        .cancels = slot->stats.cancels,
    };
}
