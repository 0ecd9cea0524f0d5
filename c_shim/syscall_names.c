/*
 * The numbers of system calls, as this processor's headers have them.  Not every processor
 * has every call: aarch64 has no open, and a library there makes do with openat.
 */
#include "confine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

struct named {
    const char *name;
    int number;
};

/* In alphabetical order, for bsearch. */
static const struct named calls[] = {
    {"accept", SYS_accept},
    {"accept4", SYS_accept4},
#ifdef SYS_access
    {"access", SYS_access},
#else
    {"access", -ENOENT},
#endif
#ifdef SYS_arch_prctl
    {"arch_prctl", SYS_arch_prctl},
#else
    {"arch_prctl", -ENOENT},
#endif
    {"bind", SYS_bind},
    {"bpf", SYS_bpf},
    {"brk", SYS_brk},
    {"capget", SYS_capget},
    {"capset", SYS_capset},
    {"chdir", SYS_chdir},
#ifdef SYS_chmod
    {"chmod", SYS_chmod},
#else
    {"chmod", -ENOENT},
#endif
#ifdef SYS_chown
    {"chown", SYS_chown},
#else
    {"chown", -ENOENT},
#endif
    {"clock_getres", SYS_clock_getres},
    {"clock_gettime", SYS_clock_gettime},
    {"clock_nanosleep", SYS_clock_nanosleep},
    {"clone", SYS_clone},
    {"clone3", SYS_clone3},
    {"close", SYS_close},
    {"close_range", SYS_close_range},
    {"connect", SYS_connect},
    {"copy_file_range", SYS_copy_file_range},
    {"delete_module", SYS_delete_module},
    {"dup", SYS_dup},
#ifdef SYS_dup2
    {"dup2", SYS_dup2},
#else
    {"dup2", -ENOENT},
#endif
    {"dup3", SYS_dup3},
    {"epoll_create1", SYS_epoll_create1},
    {"epoll_ctl", SYS_epoll_ctl},
    {"epoll_pwait", SYS_epoll_pwait},
    {"epoll_pwait2", SYS_epoll_pwait2},
#ifdef SYS_epoll_wait
    {"epoll_wait", SYS_epoll_wait},
#else
    {"epoll_wait", -ENOENT},
#endif
    {"eventfd2", SYS_eventfd2},
    {"execve", SYS_execve},
    {"execveat", SYS_execveat},
    {"exit", SYS_exit},
    {"exit_group", SYS_exit_group},
    {"faccessat", SYS_faccessat},
    {"faccessat2", SYS_faccessat2},
    {"fadvise64", SYS_fadvise64},
    {"fallocate", SYS_fallocate},
    {"fchdir", SYS_fchdir},
    {"fchmod", SYS_fchmod},
    {"fchmodat", SYS_fchmodat},
    {"fchown", SYS_fchown},
    {"fchownat", SYS_fchownat},
    {"fcntl", SYS_fcntl},
    {"fdatasync", SYS_fdatasync},
    {"finit_module", SYS_finit_module},
    {"flock", SYS_flock},
#ifdef SYS_fork
    {"fork", SYS_fork},
#else
    {"fork", -ENOENT},
#endif
    {"fstat", SYS_fstat},
    {"fstatfs", SYS_fstatfs},
    {"fsync", SYS_fsync},
    {"ftruncate", SYS_ftruncate},
    {"futex", SYS_futex},
    {"get_robust_list", SYS_get_robust_list},
    {"getcwd", SYS_getcwd},
    {"getdents64", SYS_getdents64},
    {"getegid", SYS_getegid},
    {"geteuid", SYS_geteuid},
    {"getgid", SYS_getgid},
    {"getgroups", SYS_getgroups},
    {"getpeername", SYS_getpeername},
    {"getpgid", SYS_getpgid},
#ifdef SYS_getpgrp
    {"getpgrp", SYS_getpgrp},
#else
    {"getpgrp", -ENOENT},
#endif
    {"getpid", SYS_getpid},
    {"getppid", SYS_getppid},
    {"getpriority", SYS_getpriority},
    {"getrandom", SYS_getrandom},
    {"getresgid", SYS_getresgid},
    {"getresuid", SYS_getresuid},
    {"getrlimit", SYS_getrlimit},
    {"getrusage", SYS_getrusage},
    {"getsid", SYS_getsid},
    {"getsockname", SYS_getsockname},
    {"getsockopt", SYS_getsockopt},
    {"gettid", SYS_gettid},
    {"gettimeofday", SYS_gettimeofday},
    {"getuid", SYS_getuid},
    {"init_module", SYS_init_module},
    {"io_uring_setup", SYS_io_uring_setup},
    {"ioctl", SYS_ioctl},
    {"kcmp", SYS_kcmp},
    {"kexec_file_load", SYS_kexec_file_load},
    {"kexec_load", SYS_kexec_load},
    {"keyctl", SYS_keyctl},
    {"kill", SYS_kill},
#ifdef SYS_landlock_create_ruleset
    {"landlock_create_ruleset", SYS_landlock_create_ruleset},
#else
    {"landlock_create_ruleset", -ENOENT},
#endif
#ifdef SYS_lchown
    {"lchown", SYS_lchown},
#else
    {"lchown", -ENOENT},
#endif
#ifdef SYS_link
    {"link", SYS_link},
#else
    {"link", -ENOENT},
#endif
    {"linkat", SYS_linkat},
    {"listen", SYS_listen},
    {"lseek", SYS_lseek},
#ifdef SYS_lstat
    {"lstat", SYS_lstat},
#else
    {"lstat", -ENOENT},
#endif
    {"madvise", SYS_madvise},
    {"membarrier", SYS_membarrier},
    {"memfd_create", SYS_memfd_create},
    {"mincore", SYS_mincore},
#ifdef SYS_mkdir
    {"mkdir", SYS_mkdir},
#else
    {"mkdir", -ENOENT},
#endif
    {"mkdirat", SYS_mkdirat},
#ifdef SYS_mknod
    {"mknod", SYS_mknod},
#else
    {"mknod", -ENOENT},
#endif
    {"mknodat", SYS_mknodat},
    {"mlock", SYS_mlock},
    {"mmap", SYS_mmap},
    {"mount", SYS_mount},
    {"mprotect", SYS_mprotect},
    {"mremap", SYS_mremap},
    {"msync", SYS_msync},
    {"munmap", SYS_munmap},
    {"nanosleep", SYS_nanosleep},
    {"newfstatat", SYS_newfstatat},
#ifdef SYS_open
    {"open", SYS_open},
#else
    {"open", -ENOENT},
#endif
    {"open_by_handle_at", SYS_open_by_handle_at},
    {"open_tree", SYS_open_tree},
    {"openat", SYS_openat},
    {"openat2", SYS_openat2},
#ifdef SYS_pause
    {"pause", SYS_pause},
#else
    {"pause", -ENOENT},
#endif
    {"perf_event_open", SYS_perf_event_open},
    {"pidfd_getfd", SYS_pidfd_getfd},
    {"pidfd_open", SYS_pidfd_open},
    {"pidfd_send_signal", SYS_pidfd_send_signal},
#ifdef SYS_pipe
    {"pipe", SYS_pipe},
#else
    {"pipe", -ENOENT},
#endif
    {"pipe2", SYS_pipe2},
    {"pivot_root", SYS_pivot_root},
#ifdef SYS_poll
    {"poll", SYS_poll},
#else
    {"poll", -ENOENT},
#endif
    {"ppoll", SYS_ppoll},
    {"prctl", SYS_prctl},
    {"pread64", SYS_pread64},
    {"preadv", SYS_preadv},
    {"prlimit64", SYS_prlimit64},
    {"process_vm_readv", SYS_process_vm_readv},
    {"process_vm_writev", SYS_process_vm_writev},
    {"pselect6", SYS_pselect6},
    {"ptrace", SYS_ptrace},
    {"pwrite64", SYS_pwrite64},
    {"pwritev", SYS_pwritev},
    {"read", SYS_read},
#ifdef SYS_readlink
    {"readlink", SYS_readlink},
#else
    {"readlink", -ENOENT},
#endif
    {"readlinkat", SYS_readlinkat},
    {"readv", SYS_readv},
    {"reboot", SYS_reboot},
    {"recvfrom", SYS_recvfrom},
    {"recvmmsg", SYS_recvmmsg},
    {"recvmsg", SYS_recvmsg},
#ifdef SYS_rename
    {"rename", SYS_rename},
#else
    {"rename", -ENOENT},
#endif
    {"renameat", SYS_renameat},
    {"renameat2", SYS_renameat2},
    {"restart_syscall", SYS_restart_syscall},
#ifdef SYS_rmdir
    {"rmdir", SYS_rmdir},
#else
    {"rmdir", -ENOENT},
#endif
    {"rseq", SYS_rseq},
    {"rt_sigaction", SYS_rt_sigaction},
    {"rt_sigpending", SYS_rt_sigpending},
    {"rt_sigprocmask", SYS_rt_sigprocmask},
    {"rt_sigqueueinfo", SYS_rt_sigqueueinfo},
    {"rt_sigreturn", SYS_rt_sigreturn},
    {"rt_sigsuspend", SYS_rt_sigsuspend},
    {"rt_sigtimedwait", SYS_rt_sigtimedwait},
    {"sched_get_priority_max", SYS_sched_get_priority_max},
    {"sched_get_priority_min", SYS_sched_get_priority_min},
    {"sched_getaffinity", SYS_sched_getaffinity},
    {"sched_getparam", SYS_sched_getparam},
    {"sched_getscheduler", SYS_sched_getscheduler},
    {"sched_setaffinity", SYS_sched_setaffinity},
    {"sched_yield", SYS_sched_yield},
    {"seccomp", SYS_seccomp},
#ifdef SYS_select
    {"select", SYS_select},
#else
    {"select", -ENOENT},
#endif
    {"sendmmsg", SYS_sendmmsg},
    {"sendmsg", SYS_sendmsg},
    {"sendto", SYS_sendto},
    {"set_robust_list", SYS_set_robust_list},
    {"set_tid_address", SYS_set_tid_address},
    {"setgid", SYS_setgid},
    {"setgroups", SYS_setgroups},
    {"sethostname", SYS_sethostname},
    {"setns", SYS_setns},
    {"setpgid", SYS_setpgid},
    {"setpriority", SYS_setpriority},
    {"setregid", SYS_setregid},
    {"setresgid", SYS_setresgid},
    {"setresuid", SYS_setresuid},
    {"setreuid", SYS_setreuid},
    {"setrlimit", SYS_setrlimit},
    {"setsid", SYS_setsid},
    {"setsockopt", SYS_setsockopt},
    {"settimeofday", SYS_settimeofday},
    {"setuid", SYS_setuid},
    {"shutdown", SYS_shutdown},
    {"sigaltstack", SYS_sigaltstack},
    {"socket", SYS_socket},
    {"socketpair", SYS_socketpair},
#ifdef SYS_stat
    {"stat", SYS_stat},
#else
    {"stat", -ENOENT},
#endif
    {"statfs", SYS_statfs},
    {"statx", SYS_statx},
    {"swapon", SYS_swapon},
#ifdef SYS_symlink
    {"symlink", SYS_symlink},
#else
    {"symlink", -ENOENT},
#endif
    {"symlinkat", SYS_symlinkat},
    {"sync", SYS_sync},
    {"sysinfo", SYS_sysinfo},
    {"tgkill", SYS_tgkill},
#ifdef SYS_time
    {"time", SYS_time},
#else
    {"time", -ENOENT},
#endif
    {"timerfd_create", SYS_timerfd_create},
    {"timerfd_gettime", SYS_timerfd_gettime},
    {"timerfd_settime", SYS_timerfd_settime},
    {"tkill", SYS_tkill},
    {"truncate", SYS_truncate},
    {"umask", SYS_umask},
    {"umount2", SYS_umount2},
    {"uname", SYS_uname},
#ifdef SYS_unlink
    {"unlink", SYS_unlink},
#else
    {"unlink", -ENOENT},
#endif
    {"unlinkat", SYS_unlinkat},
    {"unshare", SYS_unshare},
    {"userfaultfd", SYS_userfaultfd},
    {"utimensat", SYS_utimensat},
#ifdef SYS_vfork
    {"vfork", SYS_vfork},
#else
    {"vfork", -ENOENT},
#endif
    {"wait4", SYS_wait4},
    {"waitid", SYS_waitid},
    {"write", SYS_write},
    {"writev", SYS_writev},
};

static int by_name(const void *name, const void *entry)
{
    return strcmp(name, ((const struct named *)entry)->name);
}

int confine_syscall(const char *name)
{
    const struct named *found =
        bsearch(name, calls, sizeof(calls) / sizeof(calls[0]), sizeof(calls[0]), by_name);

    return found ? found->number : -EINVAL;
}
