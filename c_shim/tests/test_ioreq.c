/* The ioreq server's loop, with Xen's libraries played by fake_guest.c. */
#include "../ioreq.h"

#include "check.h"
#include "fake_guest.h"

enum { BASE = 0x1000, LAST = 0x1fff, ACCESSES = 3000 };

static struct ioreq_server *opened(int adopt)
{
    struct ioreq_server *server = ioreq_server_new();
    const char *missing = NULL;
    int id = ioreq_server_open(server, FAKE_DOMID, adopt, &missing);

    CHECK(id == 3 && !missing);
    CHECK(ioreq_server_enable(server, BASE, LAST, &missing) == 0);
    CHECK(ioreq_vcpus(server) == FAKE_VCPUS);
    return server;
}

/* Answers every access with its address plus its data until stopped. */
static void *serve(void *opaque)
{
    struct ioreq_server *server = opaque;
    struct ioreq_access access;
    bool answer = false;

    for (;;) {
        int found = ioreq_next(server, &access, answer, -1);

        CHECK(found > 0);
        answer = found & IOREQ_ACCESS;
        if (answer) {
            access.data += access.address;
        } else if (found & IOREQ_STOPPED) {
            return NULL;
        }
    }
}

static void *hammer(void *opaque)
{
    uint32_t vcpu = *(uint32_t *)opaque;

    for (uint64_t turn = 0; turn < ACCESSES; turn++) {
        struct fake_access access = {.address = BASE + turn % 4096, .data = vcpu << 20,
                                     .count = 1, .size = 4, .type = 1, .read = true};

        CHECK(fake_touch(vcpu, &access) == access.address + access.data);
    }
    return NULL;
}

static void each_cpu_gets_its_own_answers(void)
{
    struct ioreq_server *server = opened(IOREQ_NO_ID);
    pthread_t server_thread, cpus[FAKE_VCPUS];
    uint32_t numbers[FAKE_VCPUS];

    CHECK(pthread_create(&server_thread, NULL, serve, server) == 0);
    for (uint32_t vcpu = 0; vcpu < FAKE_VCPUS; vcpu++) {
        numbers[vcpu] = vcpu;
        CHECK(pthread_create(&cpus[vcpu], NULL, hammer, &numbers[vcpu]) == 0);
    }
    for (uint32_t vcpu = 0; vcpu < FAKE_VCPUS; vcpu++) {
        CHECK(pthread_join(cpus[vcpu], NULL) == 0);
    }
    ioreq_stop(server);
    CHECK(pthread_join(server_thread, NULL) == 0);
    CHECK(ioreq_answered(server) == (uint64_t)FAKE_VCPUS * ACCESSES);
    ioreq_server_close(server);
    CHECK(fake_servers() == 0 && !fake_enabled());
    ioreq_server_free(server);
}

static void an_adopted_server_answers_what_waits(void)
{
    struct ioreq_server *first = opened(IOREQ_NO_ID), *second;
    struct fake_access access = {.address = BASE + 8, .data = 5, .count = 1, .size = 4,
                                 .type = 1, .read = true};
    pthread_t thread;
    const char *missing = NULL;

    /* While its owner lives, nobody else has it. */
    second = ioreq_server_new();
    CHECK(ioreq_server_open(second, FAKE_DOMID, 3, &missing) == 3);
    CHECK(ioreq_server_enable(second, BASE, LAST, &missing) == -EINVAL);
    CHECK(strcmp(missing, "xenevtchn_bind_interdomain") == 0);
    ioreq_server_free(second);
    ioreq_server_free(first); /* as a process that was killed: the server stays */
    CHECK(fake_servers() == 1);

    fake_touch_silently(1, &access);
    second = opened(3);
    CHECK(fake_servers() == 1);
    CHECK(pthread_create(&thread, NULL, serve, second) == 0);
    CHECK(fake_wait(1) == BASE + 8 + 5);
    ioreq_stop(second);
    CHECK(pthread_join(thread, NULL) == 0);
    ioreq_server_close(second);
    ioreq_server_free(second);
    CHECK(fake_servers() == 0);
}

static void *close_server(void *opaque)
{
    ioreq_server_close(opaque);
    return NULL;
}

static void closing_answers_who_waits(void)
{
    struct ioreq_server *server = opened(IOREQ_NO_ID);
    struct fake_access access = {.address = BASE, .count = 1, .size = 4, .type = 1, .read = true};
    pthread_t thread;

    fake_touch_silently(0, &access);
    CHECK(pthread_create(&thread, NULL, close_server, server) == 0);
    CHECK(fake_wait(0) == UINT64_MAX);
    CHECK(pthread_join(thread, NULL) == 0);
    ioreq_server_free(server);
}

static void another_descriptor_wakes_it(void)
{
    struct ioreq_server *server = opened(IOREQ_NO_ID);
    struct ioreq_access access;
    int fd = eventfd(1, 0);

    CHECK(ioreq_next(server, &access, false, fd) == IOREQ_READABLE);
    ioreq_stop(server);
    CHECK(ioreq_next(server, &access, false, -1) == IOREQ_STOPPED);
    CHECK(ioreq_next(server, &access, false, fd) == (IOREQ_READABLE | IOREQ_STOPPED));
    close(fd);
    ioreq_server_close(server);
    ioreq_server_free(server);
}

static void guest_memory_is_copied_over_pages(void)
{
    struct ioreq_server *server = opened(IOREQ_NO_ID);
    const uint64_t first = (uint64_t)FAKE_FIRST_FRAME * 4096;
    uint8_t bytes[5000];

    for (size_t at = 0; at < sizeof(bytes); at++) {
        bytes[at] = (uint8_t)(at * 7);
    }
    CHECK(ioreq_write_memory(server, first + 4090, bytes, sizeof(bytes)) == 0);
    CHECK(memcmp(fake_memory() + 4090, bytes, sizeof(bytes)) == 0);
    memset(bytes, 0, sizeof(bytes));
    CHECK(ioreq_read_memory(server, first + 4090, bytes, sizeof(bytes)) == 0);
    CHECK(memcmp(fake_memory() + 4090, bytes, sizeof(bytes)) == 0);
    CHECK(fake_mappings() == 3);
    /* Behind the last page there is nothing. */
    CHECK(ioreq_read_memory(server, first + 4 * 4096 - 2, bytes, 4) == -EINVAL);
    CHECK(fake_mappings() <= 4);
    ioreq_forget_memory(server);
    CHECK(fake_mappings() == 0);
    CHECK(ioreq_read_memory(server, first, bytes, 1) == 0);
    ioreq_server_close(server);
    ioreq_server_free(server);
    CHECK(fake_mappings() == 0);
}

static void a_guest_that_is_not_there_is_named(void)
{
    struct ioreq_server *server = ioreq_server_new();
    const char *missing = NULL;

    CHECK(ioreq_server_open(server, FAKE_DOMID + 1, IOREQ_NO_ID, &missing) == -ESRCH);
    CHECK(strcmp(missing, "xendevicemodel_create_ioreq_server") == 0);
    ioreq_server_free(server);
}

int main(void)
{
    each_cpu_gets_its_own_answers();
    an_adopted_server_answers_what_waits();
    closing_answers_who_waits();
    another_descriptor_wakes_it();
    guest_memory_is_copied_over_pages();
    a_guest_that_is_not_there_is_named();
    return 0;
}
