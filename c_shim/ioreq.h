/*
 * An ioreq server of Xen's: one range of a guest's addresses, whose accesses come to this
 * process.  The guest's virtual CPU stands still from its access to the answer.
 *
 * Each virtual CPU has a slot in one shared page and an event channel.  What an access
 * means is the caller's business.  `ioreq_next` and what follows it belong to one thread;
 * opening and closing may block for some milliseconds.
 *
 * Everything returns 0 or a negative errno, where nothing else is said.
 * Source: Xen's public headers hvm/ioreq.h, hvm/dm_op.h, xendevicemodel.h,
 * xenforeignmemory.h (their libraries keep their interface at SONAME .1).
 */
#ifndef IOREQ_H
#define IOREQ_H

#include <stdbool.h>
#include <stdint.h>

#define IOREQ_VCPUS_MAX 128
#define IOREQ_NO_ID (-1)

/* A guest's access, as Xen tells it; `type` and the sizes are not checked here. */
struct ioreq_access {
    uint64_t address, data; /* `data`: the value, or with `data_is_ptr` its guest address */
    uint32_t count, size_bytes;
    uint32_t vcpu;
    uint8_t type;
    bool read, data_is_ptr, backwards;
};

enum ioreq_event {
    IOREQ_ACCESS = 1,  /* `access` is filled, and has to be answered by the next call */
    IOREQ_READABLE = 2, /* the descriptor that was given */
    IOREQ_STOPPED = 4,
};

struct ioreq_server;

struct ioreq_server *ioreq_server_new(void);
/* Let go of what it holds, leaving the server to the guest, and free.  The devices stay open. */
void ioreq_server_free(struct ioreq_server *server);

/*
 * Load Xen's libraries and open its devices, which stay open, before privileges are given up;
 * otherwise the first server does it.  `missing` as below.  Not for two threads at once.
 */
int ioreq_open_devices(const char **missing);

/*
 * Make a server for `domid`, not enabled yet, or with `adopt` >= 0 take over the one of
 * that id, which a process left that has ended.  Returns the id, or a negative errno with
 * `missing` naming the library, function or call that failed.
 */
int ioreq_server_open(struct ioreq_server *server, uint32_t domid, int adopt,
                      const char **missing);

/* Claim the range, enable the server and bind the channel of each virtual CPU. */
int ioreq_server_enable(struct ioreq_server *server, uint64_t first, uint64_t last,
                        const char **missing);

/*
 * Answer the access in `access`, if `answer`, with `access->data`; then wait for the next
 * one, for `fd` (or -1), or for `ioreq_stop`.  Returns a set of enum ioreq_event.
 */
int ioreq_next(struct ioreq_server *server, struct ioreq_access *access, bool answer, int fd);

/* Have `ioreq_next` return, now or when next called.  For any thread. */
void ioreq_stop(struct ioreq_server *server);

/* Virtual CPUs that were bound. */
uint32_t ioreq_vcpus(const struct ioreq_server *server);

/* Accesses that were answered so far.  For any thread. */
uint64_t ioreq_answered(const struct ioreq_server *server);

/*
 * Copy `bytes` from or to guest memory.  Pages stay mapped until `ioreq_forget_memory`,
 * which Xen asks for when a guest's memory moved.
 */
int ioreq_read_memory(struct ioreq_server *server, uint64_t address, uint8_t *to, uint32_t bytes);
int ioreq_write_memory(struct ioreq_server *server, uint64_t address, const uint8_t *from,
                       uint32_t bytes);
void ioreq_forget_memory(struct ioreq_server *server);

/* Give the range up and destroy the server: the guest then finds nothing there. */
void ioreq_server_close(struct ioreq_server *server);

#endif
