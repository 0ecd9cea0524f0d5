/*
 * The bench's guest: sends one TPM command again and again and times each answer.
 *
 *   client FD DURATION_MS COMMAND_HEX
 *
 * FD is an inherited, connected stream socket on which TPM commands are sent.  The
 * client warms the path up, writes one byte 'R' to stdout, and waits for end of file
 * on stdin; so a parent that holds one pipe open for many clients releases them all
 * at once by closing it.  It then measures for DURATION_MS and writes
 *
 *   u64 elapsed_ns; u64 count; u64 bad; u32 round_trip_ns[count]
 *
 * in the machine's byte order, where `bad` counts answers whose response code is not
 * TPM_RC_SUCCESS.  The same binary measures every row, so what it costs cancels out.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER_BYTES = 10,
    MESSAGE_MAX_BYTES = 4096,
    WARM_UP_COMMANDS = 64,
    SAMPLES_PER_MS = 250, /* four times what a bare socket pair reaches */
};

struct report {
    uint64_t elapsed_ns;
    uint64_t count;
    uint64_t bad;
};

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "bench client: %s: %s\n", what, errno ? strerror(errno) : "protocol error");
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint32_t load_be32(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

static void write_all(int fd, const void *bytes, size_t size)
{
    const uint8_t *next = bytes;

    while (size > 0) {
        ssize_t done = write(fd, next, size);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            die("write");
        next += done;
        size -= (size_t)done;
    }
}

/* One round trip; returns the response code. */
static uint32_t transact(int fd, const uint8_t *command, size_t command_bytes)
{
    uint8_t answer[MESSAGE_MAX_BYTES];
    size_t have = 0, size = HEADER_BYTES;

    write_all(fd, command, command_bytes);
    while (have < size) {
        ssize_t got = read(fd, answer + have, sizeof answer - have);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            die("the chain closed the socket");
        have += (size_t)got;
        if (have >= HEADER_BYTES) {
            size = load_be32(answer + 2);
            if (size < HEADER_BYTES || size > sizeof answer || have > size) {
                errno = 0;
                die("answer");
            }
        }
    }
    return load_be32(answer + 6);
}

static size_t parse_hex(const char *text, uint8_t *bytes, size_t room)
{
    size_t size = strlen(text) / 2;

    if (size < HEADER_BYTES || size > room)
        die("command");
    for (size_t i = 0; i < size; i++) {
        unsigned value;

        if (sscanf(text + 2 * i, "%2x", &value) != 1)
            die("command");
        bytes[i] = (uint8_t)value;
    }
    return size;
}

static void wait_for_go(void)
{
    char byte;

    write_all(STDOUT_FILENO, "R", 1);
    while (read(STDIN_FILENO, &byte, 1) != 0)
        ;
}

int main(int argc, char **argv)
{
    uint8_t command[MESSAGE_MAX_BYTES];
    struct report report = {0};

    if (argc != 4) {
        fprintf(stderr, "usage: client FD DURATION_MS COMMAND_HEX\n");
        return 2;
    }
    int fd = atoi(argv[1]);
    uint64_t duration_ms = strtoull(argv[2], NULL, 10);
    size_t command_bytes = parse_hex(argv[3], command, sizeof command);
    uint64_t room = duration_ms * SAMPLES_PER_MS;
    uint32_t *samples = malloc(room * sizeof *samples);

    if (samples == NULL)
        die("malloc");
    memset(samples, 0xff, room * sizeof *samples); /* no page fault inside the measurement */
    for (int i = 0; i < WARM_UP_COMMANDS; i++)
        transact(fd, command, command_bytes);
    wait_for_go();

    uint64_t start_ns = now_ns(), before_ns = start_ns;

    while (report.count < room && before_ns - start_ns < duration_ms * 1000000u) {
        uint32_t code = transact(fd, command, command_bytes);
        uint64_t after_ns = now_ns(), took_ns = after_ns - before_ns;

        samples[report.count++] = took_ns > UINT32_MAX ? UINT32_MAX : (uint32_t)took_ns;
        report.bad += code != 0;
        before_ns = after_ns;
    }
    report.elapsed_ns = before_ns - start_ns;
    write_all(STDOUT_FILENO, &report, sizeof report);
    write_all(STDOUT_FILENO, samples, report.count * sizeof *samples);
    free(samples);
    return 0;
}
