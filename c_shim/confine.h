/*
 * What a process does to itself so that it can do less: capabilities, no_new_privs,
 * Landlock, seccomp.  No policy is here: who calls says which paths and which system calls
 * stay.  Nothing of this can be taken back.
 *
 * Everything returns 0 (or what is asked for) or a negative errno.  capset, Landlock and
 * prctl change the calling thread alone, so call them while there is no other one.
 */
#ifndef CONFINE_H
#define CONFINE_H

#include <stdint.h>

/* How many threads this process has. */
int confine_threads(void);

/* Empty the bounding set and lock the securebits: no capability can be gained any more, and
   uid 0 is nothing special.  -EPERM without CAP_SETPCAP. */
int confine_lock_capabilities(void);

/* Give up every capability. */
int confine_drop_capabilities(void);

int confine_no_new_privs(void);

/* The version of the kernel's Landlock; -ENOSYS or -EOPNOTSUPP where there is none. */
int confine_landlock_abi(void);

struct confine_path {
    int fd; /* O_PATH, of a file or of the top of a tree */
    uint64_t rights;
};

/*
 * Allow of the handled accesses what `paths` says, and nothing else.  `handled` is of
 * files, of TCP ports and of scopes (<linux/landlock.h>); the kernel must know them all.
 */
int confine_landlock(const uint64_t handled[3], const struct confine_path *paths, uint32_t count);

/* The number of a system call on this processor; -ENOENT where it has none of that name,
   -EINVAL for a name that is not in the table here. */
int confine_syscall(const char *name);

enum { CONFINE_RULES_MAX = 400, CONFINE_ANY = 6 };

struct confine_rule {
    uint32_t number;      /* of the system call */
    uint32_t argument;    /* 0 to 5, or CONFINE_ANY: whatever it is given */
    uint64_t mask, value; /* the rule applies where (argument & mask) == value */
    uint32_t refusal;     /* 0: the call is allowed; else the errno that it fails with */
};

/*
 * Allow in all threads what `rules` says; the first rule that applies decides, and where
 * none does the call fails with EPERM.  A call of another processor's convention ends the
 * process.  -ENOSYS where this kernel or this processor cannot do it.
 */
int confine_seccomp(const struct confine_rule *rules, uint32_t count);

#endif
