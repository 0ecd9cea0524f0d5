/*
 * The bridge's hot loop: commands from QEMU's data socket to the page, responses back.
 *
 * One thread calls frontend_pump_run; it returns when asked to or when something needs a
 * decision.  While it runs, other threads may call what is marked "any time"; everything
 * else needs the pump to stand still.  No allocation after frontend_pump_new, no policy:
 * deadlines, tags and the answers made here come from the caller.
 */
#ifndef PUMP_FRONTEND_H
#define PUMP_FRONTEND_H

#include "pump_common.h"

enum frontend_mode {
    FRONTEND_HOLD,    /* read nothing: QEMU waits */
    FRONTEND_REFUSE,  /* answer each command with the refusal */
    FRONTEND_FORWARD, /* carry commands over the ring */
};

enum frontend_exit {
    FRONTEND_STOPPED,
    FRONTEND_DATA_EOF,
    FRONTEND_DATA_ERROR,
    FRONTEND_DEADLINE,      /* QEMU was answered; the page is still the backend's */
    FRONTEND_BAD_RESPONSE,  /* QEMU was answered; the backend broke the protocol */
    FRONTEND_CHANNEL_ERROR, /* QEMU was answered if it waited */
};

/* The answers made here, each a ten-byte header. */
enum frontend_answer {
    FRONTEND_ANSWER_FAILURE,
    FRONTEND_ANSWER_BAD_SIZE,
    FRONTEND_ANSWER_BAD_TAG,
    FRONTEND_ANSWER_CANCELLED,
    FRONTEND_ANSWER_REFUSAL,
    FRONTEND_ANSWERS,
};

struct frontend_stats {
    uint64_t commands, responses, refused, errors, timeouts, cancels, events, spurious;
    uint64_t bytes_in, bytes_out;
    uint32_t last_ordinal, last_response_code;
    int in_flight;
};

struct frontend_pump;

struct frontend_pump *frontend_pump_new(void); /* NULL with errno set */
void frontend_pump_free(struct frontend_pump *pump);

/* Configuration; `ordinals` ascending, both tables at most PUMP_TABLE_MAX / PUMP_TAGS_MAX. */
int frontend_pump_set_deadlines(struct frontend_pump *pump, uint32_t default_ms,
                                uint32_t cancel_grace_ms, const uint32_t *ordinals,
                                const uint32_t *deadlines_ms, uint32_t count);
int frontend_pump_set_tags(struct frontend_pump *pump, const uint16_t *command_tags,
                           uint32_t commands, const uint16_t *response_tags, uint32_t responses,
                           const uint16_t *error_tags, uint32_t errors);
void frontend_pump_set_answer(struct frontend_pump *pump, enum frontend_answer answer,
                              const uint8_t *header);
void frontend_pump_set_buffer_size(struct frontend_pump *pump, uint32_t bytes);
void frontend_pump_set_mode(struct frontend_pump *pump, enum frontend_mode mode);
/* The pump closes `fd`, and the one before it; -1 for none. */
int frontend_pump_set_data_fd(struct frontend_pump *pump, int fd);
int frontend_pump_attach_ring(struct frontend_pump *pump, struct xen_page *page,
                              struct xen_channel *channel);
void frontend_pump_detach_ring(struct frontend_pump *pump);

/* Carry commands; returns an enum frontend_exit. */
int frontend_pump_run(struct frontend_pump *pump);

/*
 * Send one command of the caller's own.  `response` has room for TPMIF_PAYLOAD_MAX_BYTES.
 * Returns its length, -EBUSY while the page is the backend's, -ECANCELED after a stop
 * "now" or an answer of IDLE, -ETIMEDOUT, -EBADMSG, or the channel's error.
 */
int frontend_pump_transact(struct frontend_pump *pump, const uint8_t *request,
                           uint32_t request_bytes, uint8_t locality, uint32_t deadline_ms,
                           uint8_t *response);

/* Any time. */
void frontend_pump_request_stop(struct frontend_pump *pump, enum pump_stop stop);
void frontend_pump_reset_stop(struct frontend_pump *pump);
/* Whether it still turns: see pump_bell_ping. */
uint64_t frontend_pump_ping(struct frontend_pump *pump);
void frontend_pump_cancel(struct frontend_pump *pump);
void frontend_pump_set_locality(struct frontend_pump *pump, uint8_t locality);
bool frontend_pump_ring_busy(struct frontend_pump *pump);
void frontend_pump_stats(struct frontend_pump *pump, struct frontend_stats *stats);
/* How often each ordinal came; `counts` has PUMP_ORDINALS + 1 entries, the last for all others. */
void frontend_pump_ordinals(struct frontend_pump *pump, uint64_t *counts);

#endif
