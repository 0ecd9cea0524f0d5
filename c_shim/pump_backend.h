/*
 * The vTPM domain's hot loop: commands from the pages of several frontends to the TPM's
 * data socket, one at a time and in turn, responses back.
 *
 * As with the frontend's pump, one thread calls backend_pump_run; what is marked "any
 * time" may be called meanwhile, everything else needs the pump to stand still.
 *
 * The TPM's volatile state is kept on disk while nothing changes it.  `clean` says that
 * what is on disk is current: the pump then stops before the first command that is not
 * in the table of read-only ordinals (BACKEND_MUTATING).  After such commands, it stops
 * once the TPM has been idle for a while (BACKEND_SETTLED), so that it can be stored again.
 */
#ifndef PUMP_BACKEND_H
#define PUMP_BACKEND_H

#include "pump_common.h"

enum { BACKEND_SLOTS = 8 };

enum backend_exit {
    BACKEND_STOPPED,
    BACKEND_ENGINE_EOF,
    BACKEND_ENGINE_DEADLINE,
    BACKEND_ENGINE_BAD_RESPONSE,
    BACKEND_MUTATING,
    BACKEND_SETTLED,
    BACKEND_CHANNEL_ERROR, /* of the slot that backend_stats names */
};

/* The answers made here, each a ten-byte header. */
enum backend_answer {
    BACKEND_ANSWER_BAD_SIZE,
    BACKEND_ANSWER_BAD_TAG,
    BACKEND_ANSWER_BAD_LOCALITY,
    BACKEND_ANSWERS,
};

struct backend_slot_stats {
    uint64_t commands, refused, events, spurious, cancels;
};

struct backend_stats {
    uint64_t commands, mutating, refused;
    uint32_t last_ordinal, last_response_code;
    uint32_t last_change_ordinal, last_change_code; /* of the last one that was not read-only */
    int in_flight_slot; /* -1: none */
    int failed_slot;    /* of BACKEND_CHANNEL_ERROR; -1: none */
};

struct backend_pump;

struct backend_pump *backend_pump_new(void); /* NULL with errno set */
void backend_pump_free(struct backend_pump *pump);

int backend_pump_set_tables(struct backend_pump *pump, const uint16_t *command_tags, uint32_t tags,
                            const uint32_t *read_only_ordinals, uint32_t ordinals);
void backend_pump_set_answer(struct backend_pump *pump, enum backend_answer answer,
                             const uint8_t *header);
/* For a command whose ordinal no table names; how long the TPM is idle until it has settled. */
void backend_pump_set_times(struct backend_pump *pump, uint32_t default_ms, uint32_t settle_ms);
/* `ordinals` ascend.  Returns 0 or -E2BIG. */
int backend_pump_set_deadlines(struct backend_pump *pump, const uint32_t *ordinals,
                               const uint32_t *deadlines_ms, uint32_t count);
/* The TPM's sockets, which stay the caller's; -1 for none.  Its locality is unknown then. */
int backend_pump_set_engine(struct backend_pump *pump, int data_fd, int control_fd);
void backend_pump_set_clean(struct backend_pump *pump, bool clean);

/* Returns the slot, or -ENOSPC.  The page and channel must stay until it is removed. */
int backend_pump_add_frontend(struct backend_pump *pump, struct xen_page *page,
                              struct xen_channel *channel);
/* An answer that this frontend waits for will be dropped. */
void backend_pump_remove_frontend(struct backend_pump *pump, int slot);

/* Whether the TPM works on a command, which a stop "now" leaves so. */
bool backend_pump_busy(const struct backend_pump *pump);

/* Serve; returns an enum backend_exit.  A command in flight stays so over a stop "now". */
int backend_pump_run(struct backend_pump *pump);
/* Answer the command in flight, or the one kept back by BACKEND_MUTATING, with `header`. */
void backend_pump_fail_in_flight(struct backend_pump *pump, const uint8_t *header);

/* Any time. */
void backend_pump_request_stop(struct backend_pump *pump, enum pump_stop stop);
void backend_pump_reset_stop(struct backend_pump *pump);
/* Whether it still turns: see pump_bell_ping. */
uint64_t backend_pump_ping(struct backend_pump *pump);
void backend_pump_stats(struct backend_pump *pump, struct backend_stats *stats);
void backend_pump_slot_stats(struct backend_pump *pump, int slot, struct backend_slot_stats *stats);

#endif
