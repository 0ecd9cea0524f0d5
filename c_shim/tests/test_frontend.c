/* The frontend's pump against a backend that this test plays, well-behaved or not. */
#include "check.h"
#include "pump_frontend.h"

enum { COMMAND = 0x17b, QUICK = 0x17e };

static const uint16_t command_tags[] = {0x8001, 0x8002, 0x00c1};
static const uint16_t response_tags[] = {0x8001, 0x8002, 0x00c4};
static const uint16_t error_tags[] = {0x00c3};

struct bench {
    struct frontend_pump *pump;
    struct ring ring;
    int qemu;
    pthread_t thread;
    int exit;
};

static void *run(void *opaque)
{
    struct bench *bench = opaque;

    bench->exit = frontend_pump_run(bench->pump);
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
    const uint32_t ordinals[] = {QUICK}, deadlines_ms[] = {20};
    uint8_t answer[10];
    int pair[2];

    *bench = (struct bench){.pump = frontend_pump_new(), .ring = ring_open()};
    CHECK(bench->pump && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    bench->qemu = pair[0];
    CHECK(frontend_pump_set_deadlines(bench->pump, 60000, 20, ordinals, deadlines_ms, 1) == 0);
    CHECK(frontend_pump_set_tags(bench->pump, command_tags, 3, response_tags, 3, error_tags, 1) == 0);
    for (int i = 0; i < FRONTEND_ANSWERS; i++) {
        header(answer, 0x8001, 10, 0x900 + (uint32_t)i);
        frontend_pump_set_answer(bench->pump, (enum frontend_answer)i, answer);
    }
    CHECK(frontend_pump_attach_ring(bench->pump, &bench->ring.page, &bench->ring.frontend) == 0);
    CHECK(frontend_pump_set_data_fd(bench->pump, pair[1]) == 0);
    frontend_pump_set_mode(bench->pump, FRONTEND_FORWARD);
}

static void bench_close(struct bench *bench)
{
    frontend_pump_detach_ring(bench->pump);
    frontend_pump_free(bench->pump);
    ring_close(&bench->ring);
    close(bench->qemu);
}

static void ask(struct bench *bench, uint32_t bytes, uint32_t ordinal)
{
    uint8_t command[8192] = {0};

    header(command, 0x8001, bytes, ordinal);
    CHECK(write(bench->qemu, command, bytes) == (ssize_t)bytes);
}

/* The response code that QEMU reads next; the response must be whole. */
static uint32_t answered(struct bench *bench)
{
    uint8_t response[4096];
    struct tpm_header got;

    read_all(bench->qemu, response, TPM_HEADER_BYTES);
    got = tpm_header_load(response);
    CHECK(got.bytes >= TPM_HEADER_BYTES && got.bytes <= TPMIF_PAYLOAD_MAX_BYTES);
    read_all(bench->qemu, response + TPM_HEADER_BYTES, got.bytes - TPM_HEADER_BYTES);
    return got.code;
}

/* The backend's part, played here. */

static struct tpmif_request fetched(struct bench *bench)
{
    struct tpmif_request request;
    struct tpmif_page *page = bench->ring.page.shared;

    while (tpmif_state(page) != TPMIF_STATE_SUBMIT) {
        sched_yield();
    }
    CHECK(tpmif_fetch(page, &request) == 0);
    return request;
}

static void finish(struct bench *bench, uint16_t tag, uint32_t announced, uint32_t bytes,
                   uint32_t code)
{
    uint8_t response[TPMIF_PAYLOAD_MAX_BYTES] = {0};

    header(response, tag, announced, code);
    tpmif_answer(bench->ring.page.shared, TPMIF_PAYLOAD_OFFSET, response, bytes);
    CHECK(xen_notify(&bench->ring.backend) == 0);
}

static void test_commands_pipelined_and_in_pieces(void)
{
    struct bench bench;
    uint8_t command[22] = {0};

    bench_open(&bench);
    start(&bench);
    ask(&bench, 12, COMMAND);
    ask(&bench, TPMIF_PAYLOAD_MAX_BYTES, COMMAND + 1);
    CHECK(fetched(&bench).bytes == 12);
    finish(&bench, 0x8001, 10, 10, 7);
    CHECK(answered(&bench) == 7);
    CHECK(fetched(&bench).bytes == TPMIF_PAYLOAD_MAX_BYTES);
    finish(&bench, 0x8002, 4088, 4088, 0);
    CHECK(answered(&bench) == 0);

    header(command, 0x8001, sizeof(command), COMMAND);
    for (size_t i = 0; i < sizeof(command); i++) {
        CHECK(write(bench.qemu, command + i, 1) == 1);
        if (i == 5) {
            /* The pieces outlive a stop and a start. */
            frontend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
            CHECK(ended(&bench) == FRONTEND_STOPPED);
            start(&bench);
        }
    }
    CHECK(fetched(&bench).bytes == sizeof(command));
    finish(&bench, 0x00c3, 10, 10, 9); /* a request tag with an error, as vtpm-stubdom does */
    CHECK(answered(&bench) == 9);
    close(bench.qemu);
    CHECK(ended(&bench) == FRONTEND_DATA_EOF);
    bench.qemu = dup(0);
    bench_close(&bench);
}

/* What QEMU's registers make of a guest's header: one write, one answer awaited. */
static void test_P1_a_size_that_is_not_what_was_written_is_answered(void)
{
    const struct {
        uint32_t written, announced;
    } cases[] = {{6, 6}, {6, 0}, {9, 9}, {12, 9}, {10, 0x1000a}, {10, 4000}, {3968, 4000}, {12, 20}};
    struct bench bench;

    bench_open(&bench);
    start(&bench);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        uint8_t command[4096] = {0};

        header(command, 0x8001, cases[i].announced, COMMAND);
        CHECK(write(bench.qemu, command, cases[i].written) == (ssize_t)cases[i].written);
        CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_BAD_SIZE);
        /* And nothing of it is taken for the next command, which comes at once. */
        ask(&bench, 12, COMMAND);
        CHECK(fetched(&bench).bytes == 12);
        finish(&bench, 0x8001, 10, 10, 7);
        CHECK(answered(&bench) == 7);
    }
    frontend_pump_request_stop(bench.pump, PUMP_STOP_NOW);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    bench_close(&bench);
}

static void test_P1_up_to_three_bytes_behind_a_command_are_no_command(void)
{
    struct bench bench;

    bench_open(&bench);
    start(&bench);
    for (uint32_t tail = 0; tail <= 3; tail++) {
        uint8_t command[16] = {0};

        header(command, 0x8001, 12, COMMAND);
        CHECK(write(bench.qemu, command, 12 + tail) == (ssize_t)(12 + tail));
        CHECK(fetched(&bench).bytes == 12);
        if (tail == 2) {
            /* A stop and a start in the middle change nothing. */
            frontend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
            finish(&bench, 0x8001, 10, 10, 7);
            CHECK(ended(&bench) == FRONTEND_STOPPED);
            start(&bench);
        } else {
            finish(&bench, 0x8001, 10, 10, 7);
        }
        CHECK(answered(&bench) == 7);
    }
    frontend_pump_request_stop(bench.pump, PUMP_STOP_NOW);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    bench_close(&bench);
}

static void test_P3_what_the_buffer_cannot_hold_is_refused(void)
{
    struct bench bench;

    bench_open(&bench);
    frontend_pump_set_buffer_size(bench.pump, 3968);
    start(&bench);
    ask(&bench, 3969, COMMAND);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_BAD_SIZE);
    ask(&bench, 3968, COMMAND);
    CHECK(fetched(&bench).bytes == 3968);
    finish(&bench, 0x8001, 10, 10, 7);
    CHECK(answered(&bench) == 7);
    frontend_pump_request_stop(bench.pump, PUMP_STOP_NOW);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    bench_close(&bench);
}

static void test_P3_bad_commands_never_reach_the_page(void)
{
    struct bench bench;
    uint8_t command[5000] = {0};

    bench_open(&bench);
    start(&bench);
    header(command, 0x8001, 9, COMMAND);
    CHECK(write(bench.qemu, command, 10) == 10);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_BAD_SIZE);
    header(command, 0x8001, sizeof(command), COMMAND);
    CHECK(write(bench.qemu, command, sizeof(command)) == sizeof(command));
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_BAD_SIZE);
    header(command, 0x01c1, 10, COMMAND);
    CHECK(write(bench.qemu, command, 10) == 10);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_BAD_TAG);
    header(command, 0x8001, UINT32_MAX, COMMAND);
    CHECK(write(bench.qemu, command, 10) == 10);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_BAD_SIZE);
    CHECK(tpmif_state(bench.ring.page.shared) == TPMIF_STATE_IDLE);
    frontend_pump_request_stop(bench.pump, PUMP_STOP_NOW);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    bench_close(&bench);
}

static void test_P2_responses_that_may_not_pass(void)
{
    struct bench bench;
    const struct {
        uint16_t tag;
        uint32_t announced, bytes;
        int exit; /* -1: the page stays in use */
    } cases[] = {
        {0x8001, 10, 9, FRONTEND_BAD_RESPONSE},  {0x8001, 11, 10, FRONTEND_BAD_RESPONSE},
        {0x8001, 9, 10, FRONTEND_BAD_RESPONSE},  {0x00c1, 10, 10, FRONTEND_BAD_RESPONSE},
        {0x00c3, 10, 10, FRONTEND_BAD_RESPONSE}, {0x8001, 10, 0, -1},
        {0x8001, 2000, 2000, -1},
    };

    bench_open(&bench);
    frontend_pump_set_buffer_size(bench.pump, 1024);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        start(&bench);
        ask(&bench, 12, COMMAND);
        (void)fetched(&bench);
        finish(&bench, cases[i].tag, cases[i].announced, cases[i].bytes, 0);
        CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_FAILURE);
        if (cases[i].exit < 0) {
            frontend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
        }
        CHECK(ended(&bench) == (cases[i].exit < 0 ? FRONTEND_STOPPED : cases[i].exit));
    }
    bench_close(&bench);
}

static void test_P1_P5_a_deadline_answers_qemu_and_keeps_the_page(void)
{
    struct bench bench;
    struct frontend_stats stats;

    bench_open(&bench);
    start(&bench);
    ask(&bench, 12, QUICK);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_FAILURE);
    CHECK(ended(&bench) == FRONTEND_DEADLINE);
    CHECK(tpmif_state(bench.ring.page.shared) == TPMIF_STATE_CANCEL);
    CHECK(frontend_pump_ring_busy(bench.pump));
    start(&bench);
    ask(&bench, 12, COMMAND); /* the page is not ours: refused */
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_FAILURE);
    finish(&bench, 0x8001, 10, 10, 0x77); /* late: dropped */
    ask(&bench, 12, COMMAND);
    (void)fetched(&bench);
    finish(&bench, 0x8001, 10, 10, 5);
    CHECK(answered(&bench) == 5);
    frontend_pump_stats(bench.pump, &stats);
    CHECK(stats.timeouts == 1 && stats.cancels == 1 && stats.commands == 3);
    frontend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    bench_close(&bench);
}

static void test_cancel_and_stop_in_flight(void)
{
    struct bench bench;
    struct tpmif_page *page;

    bench_open(&bench);
    page = bench.ring.page.shared;
    start(&bench);
    ask(&bench, 12, COMMAND);
    (void)fetched(&bench);
    frontend_pump_cancel(bench.pump);
    while (!tpmif_accept_cancel(page)) {
        sched_yield();
    }
    CHECK(xen_notify(&bench.ring.backend) == 0);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_CANCELLED);
    ask(&bench, 12, COMMAND);
    (void)fetched(&bench);
    frontend_pump_request_stop(bench.pump, PUMP_STOP_NOW);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_FAILURE);
    CHECK(frontend_pump_ring_busy(bench.pump));
    bench_close(&bench);
}

static void test_modes(void)
{
    struct bench bench;

    bench_open(&bench);
    frontend_pump_set_mode(bench.pump, FRONTEND_REFUSE);
    start(&bench);
    ask(&bench, 12, COMMAND);
    CHECK(answered(&bench) == 0x900 + FRONTEND_ANSWER_REFUSAL);
    frontend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    frontend_pump_set_mode(bench.pump, FRONTEND_HOLD);
    ask(&bench, 12, COMMAND);
    start(&bench);
    close(bench.qemu); /* noticed even while commands are held */
    CHECK(ended(&bench) == FRONTEND_DATA_EOF);
    CHECK(tpmif_state(bench.ring.page.shared) == TPMIF_STATE_IDLE);
    bench.qemu = dup(0);
    bench_close(&bench);
}

static void test_a_flood_of_events_does_not_stop_commands(void)
{
    struct bench bench;
    uint64_t most = UINT64_MAX - 1, count;

    bench_open(&bench);
    start(&bench);
    for (int i = 0; i < 20000; i++) {
        CHECK(xen_notify(&bench.ring.backend) == 0);
    }
    /* A peer may fill the counter up and empty it as it likes. */
    CHECK(read(bench.ring.frontend.fd, &count, sizeof(count)) == sizeof(count));
    CHECK(write(bench.ring.backend.notify_fd, &most, sizeof(most)) == sizeof(most));
    ask(&bench, 12, COMMAND);
    (void)fetched(&bench);
    finish(&bench, 0x8001, 10, 10, 3);
    CHECK(answered(&bench) == 3);
    frontend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    bench_close(&bench);
}

/* Run again after each exit with the ring connected anew, as the bridge does. */
static void *run_on(void *opaque)
{
    struct bench *bench = opaque;

    while ((bench->exit = frontend_pump_run(bench->pump)) != FRONTEND_STOPPED) {
        CHECK(bench->exit == FRONTEND_BAD_RESPONSE || bench->exit == FRONTEND_DEADLINE);
        frontend_pump_detach_ring(bench->pump);
        CHECK(frontend_pump_attach_ring(bench->pump, &bench->ring.page, &bench->ring.frontend) == 0);
    }
    return NULL;
}

static void test_P1_P2_P4_every_command_is_answered_whatever_the_page_does(void)
{
    struct bench bench;
    struct vandal vandal;

    bench_open(&bench);
    vandal_start(&vandal, bench.ring.page.shared, &bench.ring.backend);
    CHECK(pthread_create(&bench.thread, NULL, run_on, &bench) == 0);
    for (int i = 0; i < 500; i++) {
        ask(&bench, 12, QUICK);
        (void)answered(&bench); /* which is whole, of its announced length, and of 10 to 4088 */
    }
    frontend_pump_request_stop(bench.pump, PUMP_STOP_DRAIN);
    CHECK(ended(&bench) == FRONTEND_STOPPED);
    vandal_stop(&vandal);
    bench_close(&bench);
}

static void test_transactions_of_the_bridge_itself(void)
{
    struct bench bench;
    uint8_t request[12] = {0}, response[TPMIF_PAYLOAD_MAX_BYTES];

    bench_open(&bench);
    header(request, 0x8001, 12, COMMAND);
    CHECK(frontend_pump_transact(bench.pump, request, 12, 0, 20, response) == -ETIMEDOUT);
    CHECK(frontend_pump_transact(bench.pump, request, 12, 0, 20, response) == -EBUSY);
    CHECK(tpmif_accept_cancel(bench.ring.page.shared));
    frontend_pump_request_stop(bench.pump, PUMP_STOP_NOW);
    CHECK(frontend_pump_transact(bench.pump, request, 12, 0, 60000, response) == -ECANCELED);
    bench_close(&bench);
}

int main(void)
{
    test_commands_pipelined_and_in_pieces();
    test_P1_a_size_that_is_not_what_was_written_is_answered();
    test_P1_up_to_three_bytes_behind_a_command_are_no_command();
    test_P3_what_the_buffer_cannot_hold_is_refused();
    test_P3_bad_commands_never_reach_the_page();
    test_P2_responses_that_may_not_pass();
    test_P1_P5_a_deadline_answers_qemu_and_keeps_the_page();
    test_cancel_and_stop_in_flight();
    test_modes();
    test_a_flood_of_events_does_not_stop_commands();
    test_P1_P2_P4_every_command_is_answered_whatever_the_page_does();
    test_transactions_of_the_bridge_itself();
    return 0;
}
