/*
 * tpmif version 2: one granted page that carries one TPM command or response.
 *
 * The page is shared with a peer that may write any byte of it at any moment, so
 * every shared field is read once, atomically, into private memory, and decisions
 * use that copy (promise P4).  The payload is copied in relaxed 32-bit loads for the
 * same reason: no compiler may read it twice.
 *
 * Source: Xen's public header io/tpmif.h.  Its comment says that the header takes
 * sixteen bytes; it takes eight.  Fields are in the machine's byte order.
 */
#ifndef TPMIF_H
#define TPMIF_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    TPMIF_PAGE_BYTES = 4096,
    TPMIF_PAYLOAD_OFFSET = 8,
    TPMIF_PAYLOAD_MAX_BYTES = TPMIF_PAGE_BYTES - TPMIF_PAYLOAD_OFFSET,
};

enum tpmif_state {
    TPMIF_STATE_IDLE,
    TPMIF_STATE_SUBMIT,
    TPMIF_STATE_FINISH,
    TPMIF_STATE_CANCEL,
};

struct tpmif_page {
    _Atomic uint32_t length; /* of the request on SUBMIT, of the response on FINISH */
    _Atomic uint8_t state;
    _Atomic uint8_t locality;
    _Atomic uint8_t pad;
    _Atomic uint8_t nr_extra_pages; /* grant references in front of the payload; nobody maps them */
    _Atomic uint32_t payload[TPMIF_PAYLOAD_MAX_BYTES / 4];
};

_Static_assert(sizeof(struct tpmif_page) == TPMIF_PAGE_BYTES, "a tpmif page is one page");

/* The state byte; what the peer stored before it is visible after this. */
uint8_t tpmif_state(const struct tpmif_page *page);

/* Frontend: hand a request of 1 to TPMIF_PAYLOAD_MAX_BYTES to the backend.  The caller notifies. */
void tpmif_submit(struct tpmif_page *page, const uint8_t *request, uint32_t request_bytes,
                  uint8_t locality);

/* Frontend: ask for the request's end.  False where the backend has already finished. */
bool tpmif_cancel(struct tpmif_page *page);

/*
 * Frontend, on FINISH: move the response to `response` (TPMIF_PAYLOAD_MAX_BYTES) and
 * wipe it from the page.  Returns its length, or -EMSGSIZE where the page claims more
 * than it can hold.
 */
int tpmif_collect(struct tpmif_page *page, uint8_t *response);

struct tpmif_request {
    uint32_t bytes;
    uint32_t payload_offset; /* where the response goes as well */
    uint8_t locality;
    uint8_t payload[TPMIF_PAYLOAD_MAX_BYTES];
};

/* Backend, on SUBMIT: copy the request out.  Returns 0, or -EMSGSIZE with nothing copied. */
int tpmif_fetch(struct tpmif_page *page, struct tpmif_request *request);

/* Backend: answer.  The response must fit behind `payload_offset`.  The caller notifies. */
void tpmif_answer(struct tpmif_page *page, uint32_t payload_offset, const uint8_t *response,
                  uint32_t response_bytes);

/* Backend, with no request of this page in hand: CANCEL -> IDLE.  True where that was so. */
bool tpmif_accept_cancel(struct tpmif_page *page);

#endif
