/*
 * The yardstick: the least that a process between QEMU and a TPM can do.
 *
 *   forwarder CLIENT_FD TPM_FD
 *
 * Copies one command from CLIENT_FD to TPM_FD, then its answer back, until either side
 * closes.  It blocks in read(), takes a message with one read where the kernel has it
 * whole, and checks no more than it must to find the message's end; there is no
 * timeout, no cancel and no second channel.  A bridge with a vTPM domain is two
 * processes, so two of these in a row are what it is compared with.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { HEADER_BYTES = 10, MESSAGE_MAX_BYTES = 4096 };

static uint32_t load_be32(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

/* Carries one message from one socket to the other; 0 at end of file or error. */
static int carry(int from, int to)
{
    uint8_t message[MESSAGE_MAX_BYTES];
    size_t have = 0, size = HEADER_BYTES;

    while (have < size) {
        ssize_t got = read(from, message + have, sizeof message - have);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        have += (size_t)got;
        if (have >= HEADER_BYTES)
            size = load_be32(message + 2);
        if (size > sizeof message)
            return 0;
    }
    for (size_t sent = 0; sent < have;) {
        ssize_t done = write(to, message + sent, have - sent);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return 0;
        sent += (size_t)done;
    }
    return 1;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: forwarder CLIENT_FD TPM_FD\n");
        return 2;
    }
    int client = atoi(argv[1]), tpm = atoi(argv[2]);

    while (carry(client, tpm) && carry(tpm, client))
        ;
    return 0;
}
