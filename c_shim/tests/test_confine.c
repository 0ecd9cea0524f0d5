/* Confinement, in children: what each of them can no longer do. */
#include <linux/capability.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "check.h"
#include "confine.h"

/* Run `act` in a child; return its wait status. */
static int in_child(void (*act)(void))
{
    int status;
    pid_t child = fork();

    CHECK(child >= 0);
    if (child == 0) {
        act();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

static void test_names_are_in_order_and_right(void)
{
    CHECK(confine_syscall("read") == SYS_read);
    CHECK(confine_syscall("accept") == SYS_accept); /* the first and the last */
    CHECK(confine_syscall("writev") == SYS_writev);
    CHECK(confine_syscall("seccomp") == SYS_seccomp);
    CHECK(confine_syscall("kexec_load") == SYS_kexec_load);
    CHECK(confine_syscall("raed") == -EINVAL);
    CHECK(confine_syscall("") == -EINVAL);
#ifdef SYS_open
    CHECK(confine_syscall("open") == SYS_open);
#else
    CHECK(confine_syscall("open") == -ENOENT);
#endif
}

static void *wait_for_word(void *pipe_fd)
{
    char word;

    CHECK(read(*(int *)pipe_fd, &word, 1) == 1);
    return (void *)(intptr_t)syscall(SYS_getppid);
}

static void test_threads_are_counted(void)
{
    int fds[2], before = confine_threads();
    pthread_t thread;

    CHECK(before >= 1);
    CHECK(pipe(fds) == 0);
    CHECK(pthread_create(&thread, NULL, wait_for_word, &fds[0]) == 0);
    CHECK(confine_threads() > before); /* by one, and ThreadSanitizer adds its own */
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK(pthread_join(thread, NULL) == 0);
    close(fds[0]);
    close(fds[1]);
}

/* All calls but getppid (refused), getpgid of process 7 (another error) and kexec_load. */
static uint32_t most_calls(struct confine_rule *rules)
{
    uint32_t count = 0;

    rules[count++] = (struct confine_rule){SYS_getpgid, 0, UINT64_MAX, 7, EXDEV};
    rules[count++] = (struct confine_rule){SYS_getpgid, 0, 0xffffffff00000000, 0, 0};
    for (uint32_t number = 0; number < 340; number++) {
        if (number != SYS_getppid && number != SYS_getpgid && number != SYS_kexec_load) {
            rules[count++] = (struct confine_rule){number, CONFINE_ANY, 0, 0, 0};
        }
    }
    return count;
}

static struct confine_rule rules[CONFINE_RULES_MAX];

static void refuse_some(void)
{
    uint32_t count = most_calls(rules);

    CHECK(confine_no_new_privs() == 0);
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
    CHECK(confine_seccomp(rules, count) == 0);
}

static void calls_are_refused(void)
{
    refuse_some();
    CHECK(syscall(SYS_getppid) == -1 && errno == EPERM);
    CHECK(syscall(SYS_getpid) > 0);
    CHECK(syscall(SYS_getpgid, 0L) >= 0);
    CHECK(syscall(SYS_getpgid, 7L) == -1 && errno == EXDEV);
    /* Both halves of an argument count. */
    CHECK(syscall(SYS_getpgid, 7L | 1L << 40) == -1 && errno == EPERM);
    CHECK(syscall(SYS_getpgid, 1L << 40) == -1 && errno == EPERM);
}

static void threads_are_covered(void)
{
    int fds[2];
    pthread_t thread;
    void *result;

    CHECK(pipe(fds) == 0);
    CHECK(pthread_create(&thread, NULL, wait_for_word, &fds[0]) == 0);
    refuse_some();
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK(pthread_join(thread, &result) == 0);
    CHECK((intptr_t)result == -1);
}

#ifdef __x86_64__
/* The other convention numbers calls differently, so it must not get past the filter. */
static void call_as_i386(void)
{
    long result;

    refuse_some();
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory");
}
#endif

static void test_seccomp(void)
{
    CHECK(in_child(calls_are_refused) == 0);
    CHECK(in_child(threads_are_covered) == 0);
    CHECK(confine_seccomp(rules, CONFINE_RULES_MAX + 1) == -E2BIG);
#ifdef __x86_64__
    int status = in_child(call_as_i386);

    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
#endif
}

static void no_capability_is_left(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    CHECK(confine_lock_capabilities() == (geteuid() == 0 ? 0 : -EPERM));
    CHECK(confine_drop_capabilities() == 0);
    CHECK(syscall(SYS_capget, &header, data) == 0);
    for (int i = 0; i < 2; i++) {
        CHECK(data[i].effective == 0 && data[i].permitted == 0 && data[i].inheritable == 0);
    }
    if (geteuid() == 0) {
        CHECK(prctl(PR_CAPBSET_READ, CAP_SYS_ADMIN, 0, 0, 0) == 0);
        CHECK(prctl(PR_GET_SECUREBITS, 0, 0, 0, 0) != 0);
    }
    CHECK(syscall(SYS_setgroups, 0, NULL) == -1 && errno == EPERM);
    CHECK(confine_drop_capabilities() == 0); /* again does no harm */
    CHECK(confine_lock_capabilities() == -EPERM);
}

enum { READ_FILE = 1 << 2, READ_DIR = 1 << 3, WRITE_FILE = 1 << 1 };

static void only_one_tree_is_left(void)
{
    const uint64_t handled[3] = {READ_FILE | READ_DIR | WRITE_FILE, 0, 0};
    struct confine_path tree = {open("/proc/self", O_PATH | O_CLOEXEC), READ_FILE | READ_DIR};
    int fd;

    CHECK(tree.fd >= 0);
    CHECK(confine_no_new_privs() == 0);
    CHECK(confine_landlock(handled, &tree, 1) == 0);
    CHECK(open("/etc/passwd", O_RDONLY) == -1 && errno == EACCES);
    CHECK(open("/", O_RDONLY | O_DIRECTORY) == -1 && errno == EACCES);
    fd = open("/proc/self/status", O_RDONLY);
    CHECK(fd >= 0);
    CHECK(open("/proc/self/comm", O_WRONLY) == -1 && errno == EACCES);
}

static void test_landlock(void)
{
    const uint64_t too_much[3] = {UINT64_MAX, 0, 0};

    if (confine_landlock_abi() < 0) {
        CHECK(confine_landlock_abi() == -ENOSYS || confine_landlock_abi() == -EOPNOTSUPP);
        CHECK(confine_landlock(too_much, NULL, 0) < 0);
        fprintf(stderr, "this kernel has no Landlock\n");
        return;
    }
    CHECK(confine_landlock(too_much, NULL, 0) == -EINVAL);
    CHECK(in_child(only_one_tree_is_left) == 0);
}

int main(void)
{
    test_names_are_in_order_and_right();
    test_threads_are_counted();
    test_seccomp();
    CHECK(in_child(no_capability_is_left) == 0);
    test_landlock();
    return 0;
}
