"""Writes the C source of the extension module `qemu_vtpm_bridge._shim`.

    build_ffi.py OUTPUT.c

meson runs this with the interpreter that it builds for.  The declarations are those of
the C headers, which the compiler compares with them; `...` leaves a structure's layout
to it.
"""

from __future__ import annotations

import sys

import cffi

DECLARATIONS = """
struct tpmif_page { ...; };
struct tpmif_request {
    uint32_t bytes; uint32_t payload_offset; uint8_t locality; uint8_t payload[4088]; ...;
};
uint8_t tpmif_state(const struct tpmif_page *page);
void tpmif_submit(struct tpmif_page *page, const uint8_t *request, uint32_t request_bytes,
                  uint8_t locality);
bool tpmif_cancel(struct tpmif_page *page);
int tpmif_collect(struct tpmif_page *page, uint8_t *response);
int tpmif_fetch(struct tpmif_page *page, struct tpmif_request *request);
void tpmif_answer(struct tpmif_page *page, uint32_t payload_offset, const uint8_t *response,
                  uint32_t response_bytes);
bool tpmif_accept_cancel(struct tpmif_page *page);

struct xen { uint32_t own_domid; ...; };
struct xen_page { struct tpmif_page *shared; uint32_t ref; ...; };
struct xen_channel { int fd; uint32_t port; ...; };
int xen_open_libs(struct xen *xen, const char **missing);
int xen_open_embedded(struct xen *xen, const char *path, const char **missing);
enum xen_role { XEN_SHARES, XEN_MAPS, ... };
int xen_keep(struct xen *xen, enum xen_role role, unsigned channels);
void xen_close(struct xen *xen);
int xen_share_page(struct xen *xen, uint32_t domid, struct xen_page *page);
int xen_map_page(struct xen *xen, uint32_t domid, uint32_t ref, struct xen_page *page);
void xen_drop_page(struct xen_page *page);
int xen_alloc_unbound(struct xen *xen, uint32_t domid, struct xen_channel *channel);
int xen_bind_interdomain(struct xen *xen, uint32_t domid, uint32_t port,
                         struct xen_channel *channel);
void xen_close_channel(struct xen_channel *channel);
int xen_notify(struct xen_channel *channel);
int xen_take(struct xen_channel *channel);
int xen_rearm(struct xen_channel *channel);

struct ioreq_access {
    uint64_t address, data; uint32_t count, size_bytes; uint32_t vcpu; uint8_t type;
    bool read, data_is_ptr, backwards;
    ...;
};
enum ioreq_event { IOREQ_ACCESS, IOREQ_READABLE, IOREQ_STOPPED, ... };
struct ioreq_server;
struct ioreq_server *ioreq_server_new(void);
void ioreq_server_free(struct ioreq_server *server);
int ioreq_open_devices(const char **missing);
int ioreq_server_open(struct ioreq_server *server, uint32_t domid, int adopt,
                      const char **missing);
int ioreq_server_enable(struct ioreq_server *server, uint64_t first, uint64_t last,
                        const char **missing);
int ioreq_next(struct ioreq_server *server, struct ioreq_access *access, bool answer, int fd);
void ioreq_stop(struct ioreq_server *server);
uint32_t ioreq_vcpus(const struct ioreq_server *server);
uint64_t ioreq_answered(const struct ioreq_server *server);
int ioreq_read_memory(struct ioreq_server *server, uint64_t address, uint8_t *to, uint32_t bytes);
int ioreq_write_memory(struct ioreq_server *server, uint64_t address, const uint8_t *from,
                       uint32_t bytes);
void ioreq_forget_memory(struct ioreq_server *server);
void ioreq_server_close(struct ioreq_server *server);

enum pump_stop { PUMP_STOP_DRAIN, PUMP_STOP_NOW, ... };
#define PUMP_ORDINALS ...

enum frontend_mode { FRONTEND_HOLD, FRONTEND_REFUSE, FRONTEND_FORWARD, ... };
enum frontend_exit {
    FRONTEND_STOPPED, FRONTEND_DATA_EOF, FRONTEND_DATA_ERROR, FRONTEND_DEADLINE,
    FRONTEND_BAD_RESPONSE, FRONTEND_CHANNEL_ERROR, ...
};
enum frontend_answer {
    FRONTEND_ANSWER_FAILURE, FRONTEND_ANSWER_BAD_SIZE, FRONTEND_ANSWER_BAD_TAG,
    FRONTEND_ANSWER_CANCELLED, FRONTEND_ANSWER_REFUSAL, ...
};
struct frontend_stats {
    uint64_t commands, responses, refused, errors, timeouts, cancels, events, spurious;
    uint64_t bytes_in, bytes_out;
    uint32_t last_ordinal, last_response_code;
    int in_flight;
    ...;
};
struct frontend_pump;
struct frontend_pump *frontend_pump_new(void);
void frontend_pump_free(struct frontend_pump *pump);
int frontend_pump_set_deadlines(struct frontend_pump *pump, uint32_t default_ms,
                                uint32_t cancel_grace_ms, const uint32_t *ordinals,
                                const uint32_t *deadlines_ms, uint32_t count);
int frontend_pump_set_tags(struct frontend_pump *pump, const uint16_t *command_tags,
                           uint32_t commands, const uint16_t *response_tags, uint32_t responses,
                           const uint16_t *error_tags, uint32_t errors);
void frontend_pump_set_answer(struct frontend_pump *pump, enum frontend_answer answer,
                              const uint8_t *header);
void frontend_pump_set_buffer_size(struct frontend_pump *pump, uint32_t bytes);
void frontend_pump_set_mode(struct frontend_pump *pump, enum frontend_mode mode);
int frontend_pump_set_data_fd(struct frontend_pump *pump, int fd);
int frontend_pump_attach_ring(struct frontend_pump *pump, struct xen_page *page,
                              struct xen_channel *channel);
void frontend_pump_detach_ring(struct frontend_pump *pump);
int frontend_pump_run(struct frontend_pump *pump);
int frontend_pump_transact(struct frontend_pump *pump, const uint8_t *request,
                           uint32_t request_bytes, uint8_t locality, uint32_t deadline_ms,
                           uint8_t *response);
void frontend_pump_request_stop(struct frontend_pump *pump, enum pump_stop stop);
void frontend_pump_reset_stop(struct frontend_pump *pump);
void frontend_pump_cancel(struct frontend_pump *pump);
void frontend_pump_set_locality(struct frontend_pump *pump, uint8_t locality);
uint64_t frontend_pump_ping(struct frontend_pump *pump);
bool frontend_pump_ring_busy(struct frontend_pump *pump);
void frontend_pump_stats(struct frontend_pump *pump, struct frontend_stats *stats);
void frontend_pump_ordinals(struct frontend_pump *pump, uint64_t *counts);

enum backend_exit {
    BACKEND_STOPPED, BACKEND_ENGINE_EOF, BACKEND_ENGINE_DEADLINE, BACKEND_ENGINE_BAD_RESPONSE,
    BACKEND_MUTATING, BACKEND_SETTLED, BACKEND_CHANNEL_ERROR, ...
};
enum backend_answer {
    BACKEND_ANSWER_BAD_SIZE, BACKEND_ANSWER_BAD_TAG, BACKEND_ANSWER_BAD_LOCALITY, ...
};
struct backend_slot_stats { uint64_t commands, refused, events, spurious, cancels; ...; };
struct backend_stats {
    uint64_t commands, mutating, refused;
    uint32_t last_ordinal, last_response_code;
    uint32_t last_change_ordinal, last_change_code;
    int in_flight_slot, failed_slot;
    ...;
};
struct backend_pump;
struct backend_pump *backend_pump_new(void);
void backend_pump_free(struct backend_pump *pump);
int backend_pump_set_tables(struct backend_pump *pump, const uint16_t *command_tags, uint32_t tags,
                            const uint32_t *read_only_ordinals, uint32_t ordinals);
void backend_pump_set_answer(struct backend_pump *pump, enum backend_answer answer,
                             const uint8_t *header);
void backend_pump_set_times(struct backend_pump *pump, uint32_t default_ms, uint32_t settle_ms);
int backend_pump_set_deadlines(struct backend_pump *pump, const uint32_t *ordinals,
                               const uint32_t *deadlines_ms, uint32_t count);
bool backend_pump_busy(const struct backend_pump *pump);
int backend_pump_set_engine(struct backend_pump *pump, int data_fd, int control_fd);
void backend_pump_set_clean(struct backend_pump *pump, bool clean);
int backend_pump_add_frontend(struct backend_pump *pump, struct xen_page *page,
                              struct xen_channel *channel);
void backend_pump_remove_frontend(struct backend_pump *pump, int slot);
int backend_pump_run(struct backend_pump *pump);
void backend_pump_fail_in_flight(struct backend_pump *pump, const uint8_t *header);
void backend_pump_request_stop(struct backend_pump *pump, enum pump_stop stop);
void backend_pump_reset_stop(struct backend_pump *pump);
uint64_t backend_pump_ping(struct backend_pump *pump);
void backend_pump_stats(struct backend_pump *pump, struct backend_stats *stats);
void backend_pump_slot_stats(struct backend_pump *pump, int slot, struct backend_slot_stats *stats);

struct confine_path { int fd; uint64_t rights; };
struct confine_rule {
    uint32_t number; uint32_t argument; uint64_t mask, value; uint32_t refusal; ...;
};
#define CONFINE_RULES_MAX ...
#define CONFINE_ANY ...
int confine_threads(void);
int confine_lock_capabilities(void);
int confine_drop_capabilities(void);
int confine_no_new_privs(void);
int confine_landlock_abi(void);
int confine_landlock(const uint64_t *handled, const struct confine_path *paths, uint32_t count);
int confine_syscall(const char *name);
int confine_seccomp(const struct confine_rule *rules, uint32_t count);
"""

ffi = cffi.FFI()
ffi.cdef(DECLARATIONS)
ffi.set_source(
    "qemu_vtpm_bridge._shim",
    '#include "pump_frontend.h"\n#include "pump_backend.h"\n'
    '#include "ioreq.h"\n#include "confine.h"\n',
    py_limited_api=True,
)

if __name__ == "__main__":
    ffi.emit_c_code(sys.argv[1])
