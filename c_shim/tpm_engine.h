/*
 * The TPM behind the backend: swtpm's data and control sockets, one command at a time.
 *
 * Nothing blocks but for the answer to CMD_SET_LOCALITY, which swtpm gives at once and
 * which has a limit.  What the TPM answers is bounded and compared with its own header.
 */
#ifndef TPM_ENGINE_H
#define TPM_ENGINE_H

#include "pump_common.h"
#include "tpmif.h"

enum engine_found {
    ENGINE_WAIT,     /* nothing came yet */
    ENGINE_PROGRESS, /* a part came, or a request went out */
    ENGINE_RESPONSE, /* a whole one is in `response` */
    ENGINE_EOF,
    ENGINE_DEADLINE,
    ENGINE_BAD_RESPONSE,
};

struct tpm_engine {
    int data_fd, control_fd; /* -1: none */
    int locality;            /* -1: unknown */
    uint64_t deadline_ns;
    uint8_t response[TPMIF_PAYLOAD_MAX_BYTES];
    uint32_t response_bytes;
};

void engine_open(struct tpm_engine *engine);
/* Use these sockets, which stay the caller's; -1 for none.  0 or a negative errno. */
int engine_set_fds(struct tpm_engine *engine, int data_fd, int control_fd, int epoll_fd,
                   uint64_t key);
/* Send a command at a locality; ENGINE_PROGRESS where it went out. */
enum engine_found engine_send(struct tpm_engine *engine, const struct tpmif_request *request,
                              uint32_t deadline_ms);
/* Take what came of the response. */
enum engine_found engine_receive(struct tpm_engine *engine);

#endif
