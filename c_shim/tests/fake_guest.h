/* An HVM guest for test_ioreq.c: the calls of Xen's libraries, and CPUs that touch a range. */
#ifndef FAKE_GUEST_H
#define FAKE_GUEST_H

#include <stdbool.h>
#include <stdint.h>

enum { FAKE_DOMID = 7, FAKE_VCPUS = 2, FAKE_PAGES = 4, FAKE_FIRST_FRAME = 0x100 };

struct fake_access {
    uint64_t address, data;
    uint32_t count, size;
    uint8_t type;
    bool read, data_is_ptr;
};

/* Have CPU `vcpu` make an access, and return the answer's data; blocks until there is one. */
uint64_t fake_touch(uint32_t vcpu, const struct fake_access *access);

/* Begin one without an event, as where the event went to a process that was killed. */
void fake_touch_silently(uint32_t vcpu, const struct fake_access *access);
uint64_t fake_wait(uint32_t vcpu);

uint8_t *fake_memory(void); /* FAKE_PAGES pages from FAKE_FIRST_FRAME on */
int fake_mappings(void);    /* pages of it that are mapped now */
int fake_servers(void);     /* servers that exist */
bool fake_enabled(void);    /* whether the last one is */

#endif
