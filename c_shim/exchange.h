/*
 * The frontend's side of one page: a request, its deadline, and the one answer to it.
 *
 * A request that nobody waits for any more stays the backend's until it is answered or
 * taken back: the page carries nothing new before that (promise P5).  The backend may lie
 * in every byte; what is looked at is a private copy (P4).
 */
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "pump_common.h"
#include "tpmif.h"

struct exchange {
    struct tpmif_page *page; /* NULL: there is no ring */
    struct pump_line line;
    uint64_t deadline_ns;
    bool owed; /* the backend owes an answer that nobody waits for */

    uint16_t response_tags[PUMP_TAGS_MAX], error_tags[PUMP_TAGS_MAX];
    uint32_t response_tags_count, error_tags_count;
};

/* Tags of responses, and those that go with an error code only; 0 or -E2BIG. */
int exchange_set_tags(struct exchange *exchange, const uint16_t *response_tags, uint32_t responses,
                      const uint16_t *error_tags, uint32_t errors);
int exchange_attach(struct exchange *exchange, struct xen_page *page, struct xen_channel *channel,
                    int epoll_fd, uint64_t key);
void exchange_detach(struct exchange *exchange, int epoll_fd);

/* Whether the page is the backend's.  Any thread may ask. */
bool exchange_busy(const struct exchange *exchange);
/* Whether an answer that nobody waits for is still to come; one that came is wiped. */
bool exchange_owed(struct exchange *exchange);

/* Put a request on the page; returns 0 or the channel's error. */
int exchange_submit(struct exchange *exchange, const uint8_t *request, uint32_t bytes,
                    uint8_t locality, uint32_t deadline_ms);
void exchange_set_deadline(struct exchange *exchange, uint32_t ms);
bool exchange_past_deadline(const struct exchange *exchange);
/*
 * What the page says: 0 while the backend works, the response's length once it is in
 * `response`, -ECANCELED for IDLE, -ENODATA for an empty response, -EBADMSG for a broken one.
 */
int exchange_look(struct exchange *exchange, uint8_t *response);
/* Ask the backend to give the request up: 1 where it was asked, 0 where it is done, or an error. */
int exchange_cancel(struct exchange *exchange);
/* Nobody waits any more: take the request back, or drop its answer when it comes. */
void exchange_abandon(struct exchange *exchange);

#endif
