#include "confine.h"

#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Landlock's numbers are the same on every processor; older headers lack them. */
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

enum { LANDLOCK_VERSION_FLAG = 1, LANDLOCK_PATH_BENEATH = 1 };

#if defined(__x86_64__)
#define OUR_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define OUR_ARCH AUDIT_ARCH_AARCH64
#endif

int confine_threads(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;

    if (!tasks) {
        return -errno;
    }
    for (struct dirent *entry = readdir(tasks); entry; entry = readdir(tasks)) {
        count += entry->d_name[0] != '.';
    }
    closedir(tasks);
    return count;
}

/* Capabilities. */

int confine_lock_capabilities(void)
{
    for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++) {
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) != 0) {
            return -errno;
        }
    }
    /* Bits and their locks: uid 0 gets no capabilities, and no change of uid gives any.  Keeping
       capabilities is off and means nothing now; setpriv(1) fails where that is locked. */
    if (prctl(PR_SET_SECUREBITS,
              SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP |
                  SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
                  SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED,
              0, 0, 0) != 0) {
        return -errno;
    }
    return 0;
}

int confine_drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {0};

    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0) {
        return -errno;
    }
    return syscall(SYS_capset, &header, none) == 0 ? 0 : -errno;
}

int confine_no_new_privs(void)
{
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 ? 0 : -errno;
}

/* Landlock. */

struct path_beneath {
    uint64_t rights;
    int32_t fd;
} __attribute__((packed));

int confine_landlock_abi(void)
{
    long version = syscall(SYS_landlock_create_ruleset, NULL, (size_t)0, LANDLOCK_VERSION_FLAG);

    return version < 0 ? -errno : (int)version;
}

int confine_landlock(const uint64_t handled[3], const struct confine_path *paths, uint32_t count)
{
    /* A kernel that knows fewer fields takes the longer structure as long as those are 0. */
    long ruleset = syscall(SYS_landlock_create_ruleset, handled, 3 * sizeof(*handled), 0);
    int status = ruleset < 0 ? -errno : 0;

    for (uint32_t i = 0; i < count && status == 0; i++) {
        struct path_beneath rule = {.rights = paths[i].rights, .fd = paths[i].fd};

        if (syscall(SYS_landlock_add_rule, (int)ruleset, LANDLOCK_PATH_BENEATH, &rule, 0) != 0) {
            status = -errno;
        }
    }
    if (status == 0 && syscall(SYS_landlock_restrict_self, (int)ruleset, 0) != 0) {
        status = -errno;
    }
    if (ruleset >= 0) {
        close((int)ruleset);
    }
    return status;
}

/* seccomp. */

#ifdef OUR_ARCH

enum { RULE_STEPS_MAX = 9, FIXED_STEPS = 5 };

struct program {
    struct sock_filter steps[FIXED_STEPS + CONFINE_RULES_MAX * RULE_STEPS_MAX];
    unsigned short count;
};

static void put(struct program *program, uint16_t code, uint32_t k, uint8_t if_so, uint8_t if_not)
{
    program->steps[program->count++] =
        (struct sock_filter){.code = code, .jt = if_so, .jf = if_not, .k = k};
}

static void load(struct program *program, size_t offset)
{
    put(program, BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0);
}

static void give(struct program *program, uint32_t verdict)
{
    put(program, BPF_RET | BPF_K, verdict, 0, 0);
}

static uint32_t verdict_of(const struct confine_rule *rule)
{
    return rule->refusal == 0 ? SECCOMP_RET_ALLOW
                              : SECCOMP_RET_ERRNO | (rule->refusal & SECCOMP_RET_DATA);
}

/* Half of an argument: masked, compared, and `skip` steps over what follows where it differs. */
static void compare(struct program *program, size_t offset, uint64_t mask, uint64_t value,
                    unsigned shift, uint8_t skip)
{
    load(program, offset);
    put(program, BPF_ALU | BPF_AND | BPF_K, (uint32_t)(mask >> shift), 0, 0);
    put(program, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value >> shift), 0, skip);
}

static void add_rule(struct program *program, const struct confine_rule *rule)
{
    size_t argument = offsetof(struct seccomp_data, args) + rule->argument * sizeof(uint64_t);
    size_t high = __BYTE_ORDER == __LITTLE_ENDIAN ? 4 : 0;

    if (rule->argument == CONFINE_ANY) {
        put(program, BPF_JMP | BPF_JEQ | BPF_K, rule->number, 0, 1);
        give(program, verdict_of(rule));
        return;
    }
    put(program, BPF_JMP | BPF_JEQ | BPF_K, rule->number, 0, 8);
    compare(program, argument + (4 - high), rule->mask, rule->value, 0, 4);
    compare(program, argument + high, rule->mask, rule->value, 32, 1);
    give(program, verdict_of(rule));
    load(program, offsetof(struct seccomp_data, nr));
}

static int install(const struct program *program)
{
    struct sock_fprog filter = {.len = program->count,
                                .filter = (struct sock_filter *)program->steps};
    long status =
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter);

    if (status < 0) {
        return -errno;
    }
    return status == 0 ? 0 : -EBUSY; /* a thread that has a filter of its own */
}

int confine_seccomp(const struct confine_rule *rules, uint32_t count)
{
    struct program *program;
    int status;

    if (count > CONFINE_RULES_MAX) {
        return -E2BIG;
    }
    program = calloc(1, sizeof(*program));
    if (!program) {
        return -ENOMEM;
    }
    load(program, offsetof(struct seccomp_data, arch));
    put(program, BPF_JMP | BPF_JEQ | BPF_K, OUR_ARCH, 1, 0);
    give(program, SECCOMP_RET_KILL_PROCESS);
    load(program, offsetof(struct seccomp_data, nr));
    for (uint32_t i = 0; i < count; i++) {
        add_rule(program, &rules[i]);
    }
    give(program, SECCOMP_RET_ERRNO | EPERM);
    status = install(program);
    free(program);
    return status;
}

#else

int confine_seccomp(const struct confine_rule *rules, uint32_t count)
{
    (void)rules;
    (void)count;
    return -ENOSYS;
}

#endif
