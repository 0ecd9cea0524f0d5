#include "tpmif.h"

#include <errno.h>
#include <string.h>

/*
 * Both copies take whole words, each with one access: the compiler may not read a shared
 * word twice.  The words' size is a constant, so that a copy is a load and a store; the
 * last, partial word has its own lines.
 */
static void load_bytes(struct tpmif_page *page, uint32_t offset, uint8_t *to, uint32_t bytes)
{
    uint32_t word_at = (offset - TPMIF_PAYLOAD_OFFSET) / 4;
    uint32_t word;

    for (; bytes >= sizeof(word); bytes -= (uint32_t)sizeof(word)) {
        word = atomic_load_explicit(&page->payload[word_at++], memory_order_relaxed);
        memcpy(to, &word, sizeof(word));
        to += sizeof(word);
    }
    if (bytes > 0) {
        word = atomic_load_explicit(&page->payload[word_at], memory_order_relaxed);
        memcpy(to, &word, bytes);
    }
}

static void store_bytes(struct tpmif_page *page, uint32_t offset, const uint8_t *from,
                        uint32_t bytes)
{
    uint32_t word_at = (offset - TPMIF_PAYLOAD_OFFSET) / 4;
    uint32_t word;

    for (; bytes >= sizeof(word); bytes -= (uint32_t)sizeof(word)) {
        memcpy(&word, from, sizeof(word));
        atomic_store_explicit(&page->payload[word_at++], word, memory_order_relaxed);
        from += sizeof(word);
    }
    if (bytes > 0) {
        word = 0; /* padded: nothing of older payloads stays */
        memcpy(&word, from, bytes);
        atomic_store_explicit(&page->payload[word_at], word, memory_order_relaxed);
    }
}

uint8_t tpmif_state(const struct tpmif_page *page)
{
    /* Acquire: length and payload, which the peer stored before the state, are read after it. */
    return atomic_load_explicit(&page->state, memory_order_acquire);
}

void tpmif_submit(struct tpmif_page *page, const uint8_t *request, uint32_t request_bytes,
                  uint8_t locality)
{
    store_bytes(page, TPMIF_PAYLOAD_OFFSET, request, request_bytes);
    atomic_store_explicit(&page->length, request_bytes, memory_order_relaxed);
    atomic_store_explicit(&page->locality, locality, memory_order_relaxed);
    atomic_store_explicit(&page->pad, 0, memory_order_relaxed);
    atomic_store_explicit(&page->nr_extra_pages, 0, memory_order_relaxed);
    /* Release: all of the above must be there when the backend sees SUBMIT. */
    atomic_store_explicit(&page->state, TPMIF_STATE_SUBMIT, memory_order_release);
}

bool tpmif_cancel(struct tpmif_page *page)
{
    uint8_t expected = TPMIF_STATE_SUBMIT;

    /* Compare-exchange: a plain store could wipe out the FINISH of a response just written. */
    return atomic_compare_exchange_strong_explicit(&page->state, &expected, TPMIF_STATE_CANCEL,
                                                   memory_order_acq_rel, memory_order_acquire);
}

int tpmif_collect(struct tpmif_page *page, uint8_t *response)
{
    uint32_t length = atomic_load_explicit(&page->length, memory_order_relaxed);

    if (length > TPMIF_PAYLOAD_MAX_BYTES) {
        return -EMSGSIZE;
    }
    load_bytes(page, TPMIF_PAYLOAD_OFFSET, response, length);
    for (uint32_t word_at = 0; word_at < (length + 3) / 4; word_at++) {
        atomic_store_explicit(&page->payload[word_at], 0, memory_order_relaxed);
    }
    return (int)length;
}

int tpmif_fetch(struct tpmif_page *page, struct tpmif_request *request)
{
    uint32_t length = atomic_load_explicit(&page->length, memory_order_relaxed);
    uint32_t extra = atomic_load_explicit(&page->nr_extra_pages, memory_order_relaxed);
    uint32_t offset = TPMIF_PAYLOAD_OFFSET + 4 * extra;

    request->locality = atomic_load_explicit(&page->locality, memory_order_relaxed);
    request->payload_offset = offset;
    request->bytes = 0;
    if (length > TPMIF_PAGE_BYTES - offset) {
        return -EMSGSIZE;
    }
    load_bytes(page, offset, request->payload, length);
    request->bytes = length;
    return 0;
}

void tpmif_answer(struct tpmif_page *page, uint32_t payload_offset, const uint8_t *response,
                  uint32_t response_bytes)
{
    atomic_store_explicit(&page->length, response_bytes, memory_order_relaxed);
    store_bytes(page, payload_offset, response, response_bytes);
    /* Release: length and payload must be there when the frontend sees FINISH. */
    atomic_store_explicit(&page->state, TPMIF_STATE_FINISH, memory_order_release);
}

bool tpmif_accept_cancel(struct tpmif_page *page)
{
    uint8_t expected = TPMIF_STATE_CANCEL;

    return atomic_compare_exchange_strong_explicit(&page->state, &expected, TPMIF_STATE_IDLE,
                                                   memory_order_acq_rel, memory_order_acquire);
}
