/* The backend's pump with a TPM that this test plays, and frontends that it plays too. */
#include <poll.h>
#include <sched.h>

#include "check.h"
#include "pump_backend.h"

enum { READ_ONLY = 0x17e, CHANGING = 0x182 };

static const uint16_t command_tags[] = {0x8001, 0x8002};

struct bench {
    struct backend_pump *pump;
    struct ring rings[2];
    int slots[2];
    int data, control; /* the TPM's ends */
    int data_peer, control_peer;
    pthread_t thread;
    int exit;
};

static void *run(void *opaque)
{
    struct bench *bench = opaque;

    bench->exit = backend_pump_run(bench->pump);
    return NULL;
}

static void start(struct bench *bench)
{
    CHECK(pthread_create(&bench->thread, NULL, run, bench) == 0);
}

static int ended(struct bench *bench)
{
    CHECK(pthread_join(bench->thread, NULL) == 0);
    return bench->exit;
}

static void bench_open(struct bench *bench)
{
    const uint32_t read_only[] = {READ_ONLY};
    uint8_t answer[10];
    int data[2], control[2];

    *bench = (struct bench){.pump = backend_pump_new()};
    CHECK(bench->pump && socketpair(AF_UNIX, SOCK_STREAM, 0, data) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, control) == 0);
    bench->data = data[0];
    bench->data_peer = data[1];
    bench->control = control[0];
    bench->control_peer = control[1];
    CHECK(backend_pump_set_tables(bench->pump, command_tags, 2, read_only, 1) == 0);
    for (int i = 0; i < BACKEND_ANSWERS; i++) {
        header(answer, 0x8001, 10, 0x900 + (uint32_t)i);
        backend_pump_set_answer(bench->pump, (enum backend_answer)i, answer);
    }
    backend_pump_set_times(bench->pump, 60000, 20);
    CHECK(backend_pump_set_engine(bench->pump, data[1], control[1]) == 0);
    for (int i = 0; i < 2; i++) {
        bench->rings[i] = ring_open();
        bench->slots[i] =
            backend_pump_add_frontend(bench->pump, &bench->rings[i].page, &bench->rings[i].backend);
        CHECK(bench->slots[i] == i);
    }
}

static void bench_close(struct bench *bench)
{
    for (int i = 0; i < 2; i++) {
        backend_pump_remove_frontend(bench->pump, bench->slots[i]);
        ring_close(&bench->rings[i]);
    }
    backend_pump_free(bench->pump);
    close(bench->data);
    close(bench->data_peer);
    close(bench->control);
    close(bench->control_peer);
}

static void submit(struct bench *bench, int which, uint32_t bytes, uint32_t ordinal,
                   uint8_t locality)
{
    uint8_t command[TPMIF_PAYLOAD_MAX_BYTES] = {0};

    header(command, 0x8001, bytes, ordinal);
    tpmif_submit(bench->rings[which].page.shared, command, bytes, locality);
    CHECK(xen_notify(&bench->rings[which].frontend) == 0);
}

static uint32_t collected(struct bench *bench, int which)
{
    uint8_t response[TPMIF_PAYLOAD_MAX_BYTES];
    struct tpmif_page *page = bench->rings[which].page.shared;

    while (tpmif_state(page) != TPMIF_STATE_FINISH) {
        sched_yield();
    }
    CHECK(tpmif_collect(page, response) >= TPM_HEADER_BYTES);
    return tpm_header_load(response).code;
}

/* The TPM's part, played here: the next command's ordinal. */
static uint32_t received(struct bench *bench)
{
    uint8_t command[TPMIF_PAYLOAD_MAX_BYTES];
    struct tpm_header got;

    read_all(bench->data, command, TPM_HEADER_BYTES);
    got = tpm_header_load(command);
    read_all(bench->data, command + TPM_HEADER_BYTES, got.bytes - TPM_HEADER_BYTES);
    return got.code;
}

static void respond(struct bench *bench, uint32_t bytes, uint32_t code)
{
    uint8_t response[TPMIF_PAYLOAD_MAX_BYTES + 8] = {0};

    header(response, 0x8001, bytes, code);
    CHECK(write(bench->data, response, bytes < 10 ? 10 : bytes) > 0);
}

/* Take CMD_SET_LOCALITY and agree to it. */
static uint8_t locality_set(struct bench *bench)
{
    uint8_t command[8];

    read_all(bench->control, command, sizeof(command));
    CHECK(command[3] == 5);
    CHECK(write(bench->control, (const uint8_t[4]){0}, 4) == 4);
    return command[4];
}

static void stop(struct bench *bench)
{
    backend_pump_request_stop(bench->pump, PUMP_STOP_DRAIN);
    CHECK(ended(bench) == BACKEND_STOPPED);
}

static void test_two_frontends_take_turns_and_keep_their_localities(void)
{
    struct bench bench;

    bench_open(&bench);
    start(&bench);
    submit(&bench, 0, 12, CHANGING, 0);
    CHECK(locality_set(&bench) == 0 && received(&bench) == CHANGING);
    submit(&bench, 1, TPMIF_PAYLOAD_MAX_BYTES, READ_ONLY, 3);
    respond(&bench, 10, 1);
    CHECK(collected(&bench, 0) == 1);
    submit(&bench, 0, 12, CHANGING, 3);
    CHECK(locality_set(&bench) == 3 && received(&bench) == READ_ONLY); /* its turn, not the first's */
    respond(&bench, TPMIF_PAYLOAD_MAX_BYTES, 2);
    CHECK(collected(&bench, 1) == 2);
    CHECK(received(&bench) == CHANGING); /* same locality: not set again */
    respond(&bench, 10, 3);
    CHECK(collected(&bench, 0) == 3);
    stop(&bench);
    bench_close(&bench);
}

static void test_P3_what_is_refused_before_the_tpm(void)
{
    struct bench bench;
    struct tpmif_page *page;
    const struct {
        uint32_t length, announced;
        uint16_t tag;
        uint8_t locality, extra, answer;
    } cases[] = {
        {4089, 12, 0x8001, 0, 0, BACKEND_ANSWER_BAD_SIZE},
        {UINT32_MAX, 12, 0x8001, 0, 0, BACKEND_ANSWER_BAD_SIZE},
        {9, 9, 0x8001, 0, 0, BACKEND_ANSWER_BAD_SIZE},
        {12, 13, 0x8001, 0, 0, BACKEND_ANSWER_BAD_SIZE},
        {4088, 4088, 0x8001, 0, 1, BACKEND_ANSWER_BAD_SIZE},
        {12, 12, 0x01c1, 0, 0, BACKEND_ANSWER_BAD_TAG},
        {12, 12, 0x8001, 5, 0, BACKEND_ANSWER_BAD_LOCALITY},
    };

    bench_open(&bench);
    page = bench.rings[0].page.shared;
    start(&bench);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint8_t command[12] = {0};
        uint32_t word;

        header(command, cases[i].tag, cases[i].announced, READ_ONLY);
        for (size_t at = 0; at < sizeof(command) / 4; at++) {
            memcpy(&word, command + 4 * at, 4);
            atomic_store(&page->payload[at + cases[i].extra], word);
        }
        atomic_store(&page->length, cases[i].length);
        atomic_store(&page->locality, cases[i].locality);
        atomic_store(&page->nr_extra_pages, cases[i].extra);
        atomic_store(&page->state, TPMIF_STATE_SUBMIT);
        CHECK(xen_notify(&bench.rings[0].frontend) == 0);
        while (tpmif_state(page) != TPMIF_STATE_FINISH) {
            sched_yield();
        }
        CHECK(atomic_load(&page->length) == 10);
        memcpy(command, (uint8_t *)page + 8 + 4 * cases[i].extra, 10);
        CHECK(tpm_header_load(command).code == 0x900u + cases[i].answer);
    }
    atomic_store(&page->length, 0);
    atomic_store(&page->nr_extra_pages, 0);
    atomic_store(&page->state, TPMIF_STATE_SUBMIT);
    CHECK(xen_notify(&bench.rings[0].frontend) == 0);
    while (tpmif_state(page) != TPMIF_STATE_FINISH) {
        sched_yield();
    }
    CHECK(atomic_load(&page->length) == 0);
    stop(&bench);
    bench_close(&bench);
}

static void test_cancel_before_the_fetch_and_while_busy(void)
{
    struct bench bench;
    struct tpmif_page *page;

    bench_open(&bench);
    page = bench.rings[0].page.shared;
    atomic_store(&page->state, TPMIF_STATE_CANCEL);
    CHECK(xen_notify(&bench.rings[0].frontend) == 0);
    start(&bench);
    while (tpmif_state(page) != TPMIF_STATE_IDLE) {
        sched_yield();
    }
    submit(&bench, 0, 12, READ_ONLY, 0);
    (void)locality_set(&bench);
    (void)received(&bench);
    CHECK(tpmif_cancel(page));
    CHECK(xen_notify(&bench.rings[0].frontend) == 0);
    /* Another frontend's cancel does not wait until the TPM is free. */
    atomic_store(&bench.rings[1].page.shared->state, TPMIF_STATE_CANCEL);
    CHECK(xen_notify(&bench.rings[1].frontend) == 0);
    while (tpmif_state(bench.rings[1].page.shared) != TPMIF_STATE_IDLE) {
        sched_yield();
    }
    respond(&bench, 10, 4); /* too late to be cancelled: the answer comes */
    CHECK(collected(&bench, 0) == 4);
    submit(&bench, 0, 12, READ_ONLY, 3);
    CHECK(locality_set(&bench) == 3); /* the control channel is in step */
    CHECK(received(&bench) == READ_ONLY);
    respond(&bench, 10, 5);
    CHECK(collected(&bench, 0) == 5);
    stop(&bench);
    bench_close(&bench);
}

static void test_the_stored_state_is_given_up_before_it_is_wrong(void)
{
    struct bench bench;

    bench_open(&bench);
    backend_pump_set_clean(bench.pump, true);
    start(&bench);
    submit(&bench, 0, 12, READ_ONLY, 0);
    (void)locality_set(&bench);
    CHECK(received(&bench) == READ_ONLY);
    respond(&bench, 10, 0);
    CHECK(collected(&bench, 0) == 0);
    submit(&bench, 0, 12, CHANGING, 0);
    CHECK(ended(&bench) == BACKEND_MUTATING);
    backend_pump_set_clean(bench.pump, false);
    start(&bench);
    CHECK(received(&bench) == CHANGING);
    respond(&bench, 10, 0);
    CHECK(collected(&bench, 0) == 0);
    CHECK(ended(&bench) == BACKEND_SETTLED);
    bench_close(&bench);
}

static void test_a_tpm_that_dies_hangs_or_babbles(void)
{
    struct bench bench;
    uint8_t failure[10];

    header(failure, 0x8001, 10, 0x101);
    bench_open(&bench);
    backend_pump_set_times(bench.pump, 20, 20);
    start(&bench);
    submit(&bench, 0, 12, READ_ONLY, 0);
    (void)locality_set(&bench);
    (void)received(&bench);
    CHECK(ended(&bench) == BACKEND_ENGINE_DEADLINE);
    backend_pump_fail_in_flight(bench.pump, failure);
    CHECK(collected(&bench, 0) == 0x101);

    backend_pump_set_times(bench.pump, 60000, 20);
    for (uint32_t bytes = 9; bytes <= 4089; bytes += 4080) {
        start(&bench);
        submit(&bench, 0, 12, READ_ONLY, 0);
        (void)received(&bench);
        respond(&bench, bytes, 0);
        CHECK(ended(&bench) == BACKEND_ENGINE_BAD_RESPONSE);
        backend_pump_fail_in_flight(bench.pump, failure);
        CHECK(collected(&bench, 0) == 0x101);
        while (recv(bench.data_peer, failure, 1, MSG_DONTWAIT) == 1) {
        }
        header(failure, 0x8001, 10, 0x101);
    }
    start(&bench);
    submit(&bench, 0, 12, READ_ONLY, 0);
    (void)received(&bench);
    shutdown(bench.data, SHUT_RDWR);
    CHECK(ended(&bench) == BACKEND_ENGINE_EOF);
    backend_pump_remove_frontend(bench.pump, 0);
    backend_pump_fail_in_flight(bench.pump, failure); /* nobody waits any more */
    bench.slots[0] =
        backend_pump_add_frontend(bench.pump, &bench.rings[0].page, &bench.rings[0].backend);
    bench_close(&bench);
}

static void test_P1_each_ordinal_has_its_own_deadline(void)
{
    const uint32_t ordinals[] = {READ_ONLY, CHANGING}, deadlines_ms[] = {20, 60000};
    uint32_t many[PUMP_TABLE_MAX + 1] = {0};
    struct bench bench;

    bench_open(&bench);
    CHECK(backend_pump_set_deadlines(bench.pump, many, many, PUMP_TABLE_MAX + 1) == -E2BIG);
    CHECK(backend_pump_set_deadlines(bench.pump, ordinals, deadlines_ms, 2) == 0);
    start(&bench);
    submit(&bench, 0, 12, CHANGING, 0);
    (void)locality_set(&bench);
    (void)received(&bench);
    usleep(40000); /* longer than the other's */
    respond(&bench, 10, 0);
    CHECK(collected(&bench, 0) == 0);
    submit(&bench, 0, 12, READ_ONLY, 0);
    (void)received(&bench);
    CHECK(ended(&bench) == BACKEND_ENGINE_DEADLINE);
    CHECK(backend_pump_busy(bench.pump));
    bench_close(&bench);
}

static void test_a_frontend_comes_and_goes_while_the_tpm_works(void)
{
    struct bench bench;

    bench_open(&bench);
    start(&bench);
    submit(&bench, 0, 12, READ_ONLY, 0);
    (void)locality_set(&bench);
    (void)received(&bench);
    backend_pump_request_stop(bench.pump, PUMP_STOP_NOW);
    CHECK(ended(&bench) == BACKEND_STOPPED);
    CHECK(backend_pump_busy(bench.pump));
    backend_pump_remove_frontend(bench.pump, 0);
    start(&bench);
    submit(&bench, 1, 12, READ_ONLY, 0);
    respond(&bench, 10, 6); /* for nobody */
    CHECK(received(&bench) == READ_ONLY);
    respond(&bench, 10, 7);
    CHECK(collected(&bench, 1) == 7);
    CHECK(tpmif_state(bench.rings[0].page.shared) == TPMIF_STATE_SUBMIT); /* nobody's any more */
    stop(&bench);
    bench.slots[0] =
        backend_pump_add_frontend(bench.pump, &bench.rings[0].page, &bench.rings[0].backend);
    bench_close(&bench);
}

/* A TPM that answers everything, and looks at what it is given. */
static void *play_tpm(void *opaque)
{
    struct bench *bench = opaque;
    struct pollfd fds[2] = {{.fd = bench->control, .events = POLLIN},
                            {.fd = bench->data, .events = POLLIN}};

    for (;;) {
        CHECK(poll(fds, 2, -1) > 0);
        if (fds[0].revents & POLLIN) {
            uint8_t command[8];

            read_all(bench->control, command, sizeof(command));
            CHECK(command[3] == 5 && command[4] < 5);
            CHECK(write(bench->control, (const uint8_t[4]){0}, 4) == 4);
        }
        if (fds[1].revents & POLLIN) {
            uint8_t command[TPMIF_PAYLOAD_MAX_BYTES];
            struct tpm_header got;

            if (recv(bench->data, command, 1, MSG_PEEK) == 0) {
                return NULL;
            }
            read_all(bench->data, command, TPM_HEADER_BYTES);
            got = tpm_header_load(command);
            CHECK(got.tag == 0x8001 || got.tag == 0x8002);
            CHECK(got.bytes >= TPM_HEADER_BYTES && got.bytes <= TPMIF_PAYLOAD_MAX_BYTES);
            read_all(bench->data, command + TPM_HEADER_BYTES, got.bytes - TPM_HEADER_BYTES);
            respond(bench, TPMIF_PAYLOAD_MAX_BYTES, got.code);
        }
    }
}

static void test_P3_P4_a_page_that_changes_all_the_time_harms_nobody(void)
{
    struct bench bench;
    struct vandal vandal;
    pthread_t tpm;

    bench_open(&bench);
    CHECK(pthread_create(&tpm, NULL, play_tpm, &bench) == 0);
    vandal_start(&vandal, bench.rings[0].page.shared, &bench.rings[0].frontend);
    start(&bench);
    for (int i = 0; i < 300; i++) {
        submit(&bench, 1, 12, READ_ONLY, (uint8_t)(i % 5));
        CHECK(collected(&bench, 1) == READ_ONLY);
    }
    vandal_stop(&vandal);
    backend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
    CHECK(ended(&bench) == BACKEND_STOPPED || bench.exit == BACKEND_SETTLED);
    CHECK(shutdown(bench.data_peer, SHUT_RDWR) == 0);
    CHECK(pthread_join(tpm, NULL) == 0);
    bench_close(&bench);
}

int main(void)
{
    test_P3_P4_a_page_that_changes_all_the_time_harms_nobody();
    test_P1_each_ordinal_has_its_own_deadline();
    test_a_frontend_comes_and_goes_while_the_tpm_works();
    test_two_frontends_take_turns_and_keep_their_localities();
    test_P3_what_is_refused_before_the_tpm();
    test_cancel_before_the_fetch_and_while_busy();
    test_the_stored_state_is_given_up_before_it_is_wrong();
    test_a_tpm_that_dies_hangs_or_babbles();
    return 0;
}
