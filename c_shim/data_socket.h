/*
 * QEMU's data socket: a stream of TPM commands in, responses out, nothing ever blocking.
 *
 * The stream has no frames but the size in each command's header, and a guest chooses
 * that: QEMU passes on what its registers took, which may be shorter than the header says
 * (TIS compares 16 bits of the size, CRB cuts at its buffer) or up to three bytes longer
 * (TIS takes whole words).  QEMU then waits for one answer to one write.  So what is
 * announced and does not come is given up after a silence, and answered; and what is too
 * short to be a command, left over when an answer goes out, is dropped.
 */
#ifndef DATA_SOCKET_H
#define DATA_SOCKET_H

#include "pump_common.h"
#include "tpmif.h"

enum {
    DATA_INPUT_BYTES = 2 * TPMIF_PAGE_BYTES,
    /* A silence after which no more of a command with a bad size is waited for. */
    DATA_SILENCE_MS = 50,
    /* The same for one whose size is good: its sender may be slow, but has an end too. */
    DATA_PARTIAL_MS = 2000,
    /* More than QEMU's TIS leaves behind a command that it wrote in words. */
    DATA_TAIL_BYTES = 3,
};

enum data_found {
    DATA_NOTHING,  /* wait for events, or until data_wait_ms */
    DATA_PROGRESS, /* look again */
    DATA_COMMAND,  /* a whole one is at the front of `input` */
    DATA_BAD_SIZE, /* one was taken off that is to be answered with an error */
    DATA_EOF,
    DATA_ERROR,
};

struct data_socket {
    int fd; /* -1: none */
    int epoll_fd;
    uint64_t key;
    bool ready, half_closed, hung_up, output_blocked;

    uint8_t input[DATA_INPUT_BYTES];
    uint32_t input_bytes;
    uint64_t silent_until_ns; /* what is incomplete is given up then; 0: nothing is */
    bool skipping;            /* the rest of a command with a bad size is thrown away */
    uint64_t skip_bytes;      /* so much of it at most */

    uint8_t output[TPMIF_PAYLOAD_MAX_BYTES];
    uint32_t output_at, output_bytes;
};

void data_open(struct data_socket *data, int epoll_fd, uint64_t key);
/* Use another descriptor, which data_set_fd closes in the end; -1 for none. */
int data_set_fd(struct data_socket *data, int fd);
/* Events came for `key`. */
void data_note(struct data_socket *data, uint32_t events);

/* Look for the next command, of at most `most_bytes`; `header` is that of DATA_COMMAND. */
enum data_found data_next(struct data_socket *data, uint32_t most_bytes, struct tpm_header *header);
/* Take `bytes` off the front of the input. */
void data_drop(struct data_socket *data, uint32_t bytes);

/* Queue an answer, unless it is in `output` already, and drop what no command can begin with. */
void data_answer(struct data_socket *data, const uint8_t *answer, uint32_t bytes);
/* Send what is queued: DATA_PROGRESS once all is sent. */
enum data_found data_send(struct data_socket *data);

/* Milliseconds until data_next has something to say by itself, -1 for never. */
int data_wait_ms(const struct data_socket *data, int most_ms);

#endif
