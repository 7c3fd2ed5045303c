//! The `RuntimeDefault` seccomp profile: what a container may ask of the kernel unless it says
//! otherwise.
//!
//! A table of our own. Its content follows what the field's runtimes allow by default, so that an
//! image that runs elsewhere runs here: everything is refused with `EPERM` but the calls listed,
//! and some calls come with the capability that they need. `io_uring` is left out on purpose.

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

/// Allowed to every container.
const ALLOWED: &str = "accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown \
     chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime \
     clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect \
     copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old \
     epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit \
     exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod \
     fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr \
     flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate \
     ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat \
     get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid \
     geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid \
     getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit \
     getrusage getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr \
     getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel \
     io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl \
     ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset \
     landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr \
     listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise \
     map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat \
     mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive \
     mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget \
     msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat \
     _newselect open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc \
     pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 \
     process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink \
     readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr \
     removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction \
     rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
     rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min \
     sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval \
     sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
     sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop \
     semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list \
     set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 \
     setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid \
     setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid \
     setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd \
     signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 \
     statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time \
     timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime \
     timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime \
     timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat \
     uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write \
     writev";

/// Allowed with a capability in the bounding set.
const WITH_CAPABILITY: [(&str, &str); 14] = [
    ("CAP_BPF", "bpf"),
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    ("CAP_PERFMON", "perf_event_open"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie \
         lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog \
         umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    (
        "CAP_SYS_MODULE",
        "delete_module finit_module init_module query_module",
    ),
    (
        "CAP_SYS_NICE",
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    ("CAP_SYS_PACCT", "acct"),
    (
        "CAP_SYS_PTRACE",
        "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace",
    ),
    ("CAP_SYS_RAWIO", "ioperm iopl"),
    (
        "CAP_SYS_TIME",
        "clock_settime clock_settime64 settimeofday stime",
    ),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYSLOG", "syslog"),
];

/// Allowed since Linux 4.8, where seccomp also sees what a tracer changes; older kernels are not
/// supported here.
const TRACING: &str = "process_vm_readv process_vm_writev ptrace";

/// Allowed on one architecture only.
const OF_THIS_ARCHITECTURE: &str = if cfg!(target_arch = "x86_64") {
    "arch_prctl modify_ldt"
} else if cfg!(target_arch = "aarch64") {
    "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2"
} else if cfg!(target_arch = "riscv64") {
    "riscv_flush_icache riscv_hwprobe"
} else if cfg!(target_arch = "s390x") {
    "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"
} else if cfg!(target_arch = "powerpc64") {
    "swapcontext sync_file_range2"
} else {
    ""
};

/// Values of `personality` that change nothing a container could abuse: Linux, its 32-bit
/// variants, no address randomisation for either, and asking for the current one.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// Sockets of virtual machines reach the host whatever the network namespace, so they are refused.
const AF_VSOCK: u64 = 40;
/// Flags of `clone` that make namespaces.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;
/// Makes C libraries fall back from `clone3`, whose flags cannot be looked at, to `clone`.
const ENOSYS: u32 = 38;
const EPERM: u32 = 1;

/// The profile for a process with these capabilities in its bounding set, by names such as
/// `CAP_SYS_ADMIN`.
///
/// # Errors
/// Never for names of any kind; the type is that of the spec's builders.
pub fn profile(capabilities: &[impl AsRef<str>]) -> Result<LinuxSeccomp, OciSpecError> {
    let has = |wanted: &str| capabilities.iter().any(|name| name.as_ref() == wanted);
    let mut syscalls = vec![allow(ALLOWED, &[])?, allow(TRACING, &[])?];
    for value in PERSONALITIES {
        let same = argument(0, LinuxSeccompOperator::ScmpCmpEq, value, None)?;
        syscalls.push(allow("personality", &[same])?);
    }
    let other = argument(0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None)?;
    syscalls.push(allow("socket", &[other])?);
    if !OF_THIS_ARCHITECTURE.is_empty() {
        syscalls.push(allow(OF_THIS_ARCHITECTURE, &[])?);
    }
    for (capability, names) in WITH_CAPABILITY {
        if has(capability) {
            syscalls.push(allow(names, &[])?);
        }
    }
    if !has("CAP_SYS_ADMIN") {
        // On s390x the flags are the second argument.
        let index = usize::from(cfg!(target_arch = "s390x"));
        let masked = LinuxSeccompOperator::ScmpCmpMaskedEq;
        let none = argument(index, masked, NAMESPACE_FLAGS, Some(0))?;
        syscalls.push(allow("clone", &[none])?);
        syscalls.push(
            LinuxSyscallBuilder::default()
                .names(["clone3".to_owned()])
                .action(LinuxSeccompAction::ScmpActErrno)
                .errno_ret(ENOSYS)
                .build()?,
        );
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(architectures())
        .syscalls(syscalls)
        .build()
}

/// The native architecture first, then those whose programs it also runs.
fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "x86_64") {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    } else if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else if cfg!(target_arch = "s390x") {
        vec![Arch::ScmpArchS390x, Arch::ScmpArchS390]
    } else {
        Vec::new()
    }
}

fn allow(names: &str, arguments: &[LinuxSeccompArg]) -> Result<LinuxSyscall, OciSpecError> {
    let names: Vec<String> = names.split_whitespace().map(str::to_owned).collect();
    let builder = LinuxSyscallBuilder::default()
        .names(names)
        .action(LinuxSeccompAction::ScmpActAllow);
    match arguments {
        [] => builder.build(),
        some => builder.args(some.to_vec()).build(),
    }
}

fn argument(
    index: usize,
    operator: LinuxSeccompOperator,
    value: u64,
    value_two: Option<u64>,
) -> Result<LinuxSeccompArg, OciSpecError> {
    let builder = LinuxSeccompArgBuilder::default()
        .index(index)
        .op(operator)
        .value(value);
    match value_two {
        None => builder.build(),
        Some(value) => builder.value_two(value).build(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rules(capabilities: &[&str]) -> Vec<Value> {
        let profile = serde_json::to_value(profile(capabilities).unwrap()).unwrap();
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(profile["defaultErrnoRet"], 1);
        profile["syscalls"].as_array().unwrap().clone()
    }

    fn of<'a>(rules: &'a [Value], name: &str) -> Vec<&'a Value> {
        let names = |rule: &Value| rule["names"].as_array().unwrap().contains(&json!(name));
        rules.iter().filter(|rule| names(rule)).collect()
    }

    #[test]
    fn ordinary_containers_cannot_make_namespaces() {
        let rules = rules(&["CAP_CHOWN"]);
        for name in [
            "mount",
            "unshare",
            "setns",
            "bpf",
            "reboot",
            "chroot",
            "io_uring_setup",
        ] {
            assert!(of(&rules, name).is_empty(), "{name}");
        }
        assert_eq!(of(&rules, "read").len(), 1);
        assert_eq!(of(&rules, "personality").len(), 5);
        let clone = of(&rules, "clone")[0];
        assert_eq!(clone["args"][0]["op"], "SCMP_CMP_MASKED_EQ");
        assert_eq!(clone["args"][0]["value"], 0x7e02_0000);
        let clone3 = of(&rules, "clone3")[0];
        assert_eq!(
            (&clone3["action"], &clone3["errnoRet"]),
            (&json!("SCMP_ACT_ERRNO"), &json!(38))
        );
        assert_eq!(of(&rules, "socket")[0]["args"][0]["value"], 40);
    }

    #[test]
    fn capabilities_bring_their_calls() {
        let rules = rules(&["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]);
        for name in ["mount", "unshare", "clone3", "chroot"] {
            let found = of(&rules, name);
            assert!(
                found.len() == 1 && found[0]["action"] == "SCMP_ACT_ALLOW",
                "{name}"
            );
        }
        assert!(of(&rules, "clone")[0].get("args").is_none());
    }

    #[test]
    fn every_name_is_a_name_and_listed_once() {
        let mut seen = std::collections::HashSet::new();
        for name in ALLOWED.split_whitespace() {
            assert!(
                name.chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            );
            assert!(seen.insert(name), "{name} twice");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn architectures_have_the_names_runtimes_know() {
        let profile = serde_json::to_value(profile(&[""; 0]).unwrap()).unwrap();
        let want = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
        assert_eq!(profile["architectures"], want);
    }
}
