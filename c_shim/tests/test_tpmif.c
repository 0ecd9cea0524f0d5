/* The page's functions: round trips, limits, and a peer that changes the page while it is read. */
#include "check.h"
#include "tpmif.h"

static struct tpmif_page page;

static void test_round_trip(void)
{
    uint8_t sent[TPMIF_PAYLOAD_MAX_BYTES], received[TPMIF_PAYLOAD_MAX_BYTES];
    static struct tpmif_request request;

    for (uint32_t bytes = 1; bytes <= TPMIF_PAYLOAD_MAX_BYTES; bytes++) {
        for (uint32_t i = 0; i < bytes; i++) {
            sent[i] = (uint8_t)(i * 7 + bytes);
        }
        tpmif_submit(&page, sent, bytes, 3);
        CHECK(tpmif_state(&page) == TPMIF_STATE_SUBMIT);
        CHECK(tpmif_fetch(&page, &request) == 0);
        CHECK(request.bytes == bytes && request.locality == 3);
        CHECK(memcmp(request.payload, sent, bytes) == 0);
        tpmif_answer(&page, request.payload_offset, sent, bytes);
        CHECK(tpmif_state(&page) == TPMIF_STATE_FINISH);
        CHECK(tpmif_collect(&page, received) == (int)bytes);
        CHECK(memcmp(received, sent, bytes) == 0);
        for (uint32_t i = 0; i < TPMIF_PAYLOAD_MAX_BYTES / 4; i++) {
            CHECK(atomic_load(&page.payload[i]) == 0); /* nothing stays behind */
        }
    }
}

static void test_a_partial_word_is_padded_and_no_byte_more_is_written(void)
{
    static struct tpmif_request request;
    uint8_t sent[16], received[TPMIF_PAYLOAD_MAX_BYTES];

    memset(sent, 0x5a, sizeof(sent));
    for (uint32_t bytes = 1; bytes <= sizeof(sent); bytes++) {
        uint8_t *shared = (uint8_t *)page.payload;
        uint32_t padded = (bytes + 3) / 4 * 4;

        for (uint32_t i = 0; i < TPMIF_PAYLOAD_MAX_BYTES / 4; i++) {
            atomic_store(&page.payload[i], UINT32_MAX); /* an older payload */
        }
        tpmif_submit(&page, sent, bytes, 0);
        for (uint32_t i = 0; i < padded + 4; i++) {
            CHECK(shared[i] == (i < bytes ? 0x5a : i < padded ? 0 : 0xff));
        }
        memset(request.payload, 0xa5, sizeof(request.payload));
        CHECK(tpmif_fetch(&page, &request) == 0 && request.bytes == bytes);
        memset(received, 0xa5, sizeof(received));
        CHECK(tpmif_collect(&page, received) == (int)bytes);
        for (uint32_t i = 0; i < 2 * sizeof(sent); i++) {
            CHECK(request.payload[i] == (i < bytes ? 0x5a : 0xa5));
            CHECK(received[i] == request.payload[i]);
        }
    }
    memset((void *)page.payload, 0, sizeof(page.payload));
}

static void test_lengths_that_a_peer_may_claim(void)
{
    const struct {
        uint32_t length;
        int collected, fetched;
    } cases[] = {{0, 0, 0},       {9, 9, 0},         {4088, 4088, 0},
                 {4089, -EMSGSIZE, -EMSGSIZE},       {UINT32_MAX, -EMSGSIZE, -EMSGSIZE}};
    uint8_t response[TPMIF_PAYLOAD_MAX_BYTES];
    static struct tpmif_request request;

    atomic_store(&page.nr_extra_pages, 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        atomic_store(&page.length, cases[i].length);
        CHECK(tpmif_fetch(&page, &request) == cases[i].fetched);
        CHECK(request.bytes == (cases[i].fetched == 0 ? cases[i].length : 0));
        atomic_store(&page.length, cases[i].length);
        CHECK(tpmif_collect(&page, response) == cases[i].collected);
    }
}

static void test_extra_pages_move_the_payload(void)
{
    static struct tpmif_request request;

    atomic_store(&page.nr_extra_pages, 255);
    atomic_store(&page.length, 4096 - 8 - 4 * 255);
    CHECK(tpmif_fetch(&page, &request) == 0);
    CHECK(request.payload_offset == 1028);
    atomic_store(&page.length, 4096 - 8 - 4 * 255 + 1);
    CHECK(tpmif_fetch(&page, &request) == -EMSGSIZE);
    atomic_store(&page.nr_extra_pages, 0);
}

static void test_cancel_never_wipes_out_an_answer(void)
{
    atomic_store(&page.state, TPMIF_STATE_FINISH);
    CHECK(!tpmif_cancel(&page));
    CHECK(tpmif_state(&page) == TPMIF_STATE_FINISH);
    CHECK(!tpmif_accept_cancel(&page));
    atomic_store(&page.state, TPMIF_STATE_SUBMIT);
    CHECK(tpmif_cancel(&page));
    CHECK(tpmif_state(&page) == TPMIF_STATE_CANCEL);
    CHECK(tpmif_accept_cancel(&page));
    CHECK(tpmif_state(&page) == TPMIF_STATE_IDLE);
}

static atomic_bool enough;

static void *mutate(void *unused)
{
    uint32_t seed = 1;

    (void)unused;
    while (!atomic_load(&enough)) {
        seed = seed * 1664525 + 1013904223;
        atomic_store_explicit(&page.length, seed % 3 ? seed % 5000 : seed, memory_order_relaxed);
        atomic_store_explicit(&page.nr_extra_pages, (uint8_t)(seed >> 8), memory_order_relaxed);
        atomic_store_explicit(&page.locality, (uint8_t)(seed >> 16), memory_order_relaxed);
        atomic_store_explicit(&page.state, (uint8_t)(seed >> 24), memory_order_relaxed);
        atomic_store_explicit(&page.payload[seed % 1022], seed, memory_order_relaxed);
    }
    return NULL;
}

static void test_P4_a_page_that_changes_between_any_two_reads(void)
{
    /* A guard behind each buffer: a length that was read twice would run over it. */
    struct {
        struct tpmif_request request;
        uint8_t guard[64];
    } fetched;
    struct {
        uint8_t response[TPMIF_PAYLOAD_MAX_BYTES];
        uint8_t guard[64];
    } collected;
    pthread_t peer;

    memset(fetched.guard, 0x5a, sizeof(fetched.guard));
    memset(collected.guard, 0x5a, sizeof(collected.guard));
    CHECK(pthread_create(&peer, NULL, mutate, NULL) == 0);
    for (int i = 0; i < 50000; i++) {
        int bytes = tpmif_collect(&page, collected.response);

        CHECK(bytes == -EMSGSIZE || (bytes >= 0 && bytes <= TPMIF_PAYLOAD_MAX_BYTES));
        if (tpmif_fetch(&page, &fetched.request) == 0) {
            CHECK(fetched.request.bytes <= TPMIF_PAYLOAD_MAX_BYTES);
            CHECK(fetched.request.payload_offset + fetched.request.bytes <= TPMIF_PAGE_BYTES);
        } else {
            CHECK(fetched.request.bytes == 0);
        }
        (void)tpmif_cancel(&page);
        (void)tpmif_accept_cancel(&page);
    }
    atomic_store(&enough, true);
    pthread_join(peer, NULL);
    for (size_t i = 0; i < sizeof(fetched.guard); i++) {
        CHECK(fetched.guard[i] == 0x5a && collected.guard[i] == 0x5a);
    }
}

int main(void)
{
    test_round_trip();
    test_a_partial_word_is_padded_and_no_byte_more_is_written();
    test_lengths_that_a_peer_may_claim();
    test_extra_pages_move_the_payload();
    test_cancel_never_wipes_out_an_answer();
    test_P4_a_page_that_changes_between_any_two_reads();
    return 0;
}
