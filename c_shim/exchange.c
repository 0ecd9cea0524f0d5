#include "exchange.h"

#include <errno.h>
#include <string.h>

int exchange_set_tags(struct exchange *exchange, const uint16_t *response_tags, uint32_t responses,
                      const uint16_t *error_tags, uint32_t errors)
{
    if (responses > PUMP_TAGS_MAX || errors > PUMP_TAGS_MAX) {
        return -E2BIG;
    }
    memcpy(exchange->response_tags, response_tags, responses * sizeof(uint16_t));
    memcpy(exchange->error_tags, error_tags, errors * sizeof(uint16_t));
    exchange->response_tags_count = responses;
    exchange->error_tags_count = errors;
    return 0;
}

int exchange_attach(struct exchange *exchange, struct xen_page *page, struct xen_channel *channel,
                    int epoll_fd, uint64_t key)
{
    exchange->page = page->shared;
    exchange->owed = false;
    return pump_line_open(&exchange->line, channel, epoll_fd, key);
}

void exchange_detach(struct exchange *exchange, int epoll_fd)
{
    pump_line_close(&exchange->line, epoll_fd);
    exchange->page = NULL;
    exchange->owed = false;
}

bool exchange_busy(const struct exchange *exchange)
{
    uint8_t state;

    if (!exchange->page) {
        return false;
    }
    state = tpmif_state(exchange->page);
    return state == TPMIF_STATE_SUBMIT || state == TPMIF_STATE_CANCEL;
}

bool exchange_owed(struct exchange *exchange)
{
    uint8_t dropped[TPMIF_PAYLOAD_MAX_BYTES];

    if (exchange->owed && !exchange_busy(exchange)) {
        (void)tpmif_collect(exchange->page, dropped);
        exchange->owed = false;
    }
    return exchange->owed;
}

void exchange_set_deadline(struct exchange *exchange, uint32_t ms)
{
    exchange->deadline_ns = pump_now_ns() + (uint64_t)ms * 1000000u;
}

bool exchange_past_deadline(const struct exchange *exchange)
{
    return pump_now_ns() >= exchange->deadline_ns;
}

int exchange_submit(struct exchange *exchange, const uint8_t *request, uint32_t bytes,
                    uint8_t locality, uint32_t deadline_ms)
{
    tpmif_submit(exchange->page, request, bytes, locality);
    exchange_set_deadline(exchange, deadline_ms);
    return xen_notify(exchange->line.channel);
}

static bool good_response(const struct exchange *exchange, const uint8_t *response, uint32_t bytes)
{
    struct tpm_header header;

    if (bytes < TPM_HEADER_BYTES) {
        return false;
    }
    header = tpm_header_load(response);
    return header.bytes == bytes &&
           (pump_has_tag(exchange->response_tags, exchange->response_tags_count, header.tag) ||
            (header.code != 0 &&
             pump_has_tag(exchange->error_tags, exchange->error_tags_count, header.tag)));
}

int exchange_look(struct exchange *exchange, uint8_t *response)
{
    int bytes;

    switch (tpmif_state(exchange->page)) {
    case TPMIF_STATE_IDLE:
        return -ECANCELED;
    case TPMIF_STATE_FINISH:
        break;
    default:
        return 0;
    }
    bytes = tpmif_collect(exchange->page, response);
    if (bytes == 0) {
        return -ENODATA;
    }
    return bytes > 0 && good_response(exchange, response, (uint32_t)bytes) ? bytes : -EBADMSG;
}

int exchange_cancel(struct exchange *exchange)
{
    int status;

    if (!tpmif_cancel(exchange->page)) {
        return 0;
    }
    status = xen_notify(exchange->line.channel);
    return status == 0 ? 1 : status;
}

void exchange_abandon(struct exchange *exchange)
{
    (void)tpmif_cancel(exchange->page);
    exchange->owed = true;
}
