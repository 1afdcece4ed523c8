//! What a migration does to the process that it runs in.
//!
//! # Threads
//!
//! [`migrate`](crate::Source::migrate) and [`receive`](crate::Target::receive) **block the calling thread** until the
//! migration has ended: give them a thread of their own, not the VMM's event loop. A hook that needs the event loop posts
//! to it and waits. When they return, every thread that they started has been joined, with one exception.
//!
//! | thread | how many | lives | runs the start hook |
//! |---|---|---|---|
//! | the caller's, at both sides | 1 | | no: it is the VMM's |
//! | `pf-send-i` at the source, `pf-recv-i` at the target | one a channel | while pages travel | yes |
//! | `pf-pause`, `pf-scan` at the source | 1, one after the other | beside the `pause` and the `save_state` hook | yes |
//! | `pf-hash`, `pf-hash-i` at both sides | as many as channels | with `Verify::Full`, while the guest stands still | no |
//! | `pf-dial-i` at the source | one a connection that was lost | while it is made again | yes |
//! | `pf-resolve` at the source | 1 | while a host name is looked up | no |
//!
//! `pf-resolve` is the exception: getaddrinfo(3) cannot be interrupted, so a cancel leaves it behind. It holds nothing of
//! the VMM's and ends by itself; an address in numbers needs no such thread. Workers and lanes come from the VMM's
//! [`Spawn`](crate::crew::Spawn) if it brings one; the others from std. If a thread cannot be had, workers and lanes fail
//! the migration, and all others only make it slower.
//!
//! # System calls
//!
//! What each thread was seen to call, by strace on x86-64 with glibc 2.36 (`tests/syscalls.rs` holds this table against
//! the program). A filter that the start hook installs sees what stands in the rows of the thread and of *all*, without
//! what only a start needs; `pf-hash`, `pf-resolve` and all threads before their hook have the filter of the caller.
//!
//! | thread | calls |
//! |---|---|
//! | all, for memory | `brk` `mmap` `munmap` `mremap` `mprotect` `madvise`; once in a while, glibc's allocator reads a file of /sys or /proc: `openat` `read` `close` |
//! | all, at the start | `rseq` `set_robust_list` `prctl` `rt_sigprocmask` `gettid` `sched_getaffinity` `sched_setaffinity` `sigaltstack` |
//! | all, at the end | `rt_sigprocmask` `sigaltstack` `madvise` `munmap` `exit` |
//! | all, where the vDSO does not serve | `clock_gettime` `getcpu` |
//! | `pf-send-i` | `sendmsg` `futex` `write`; where the other side is on this host, `sched_yield`; where pages go by reference ([`ZeroCopy`](crate::ZeroCopy)), `recvmsg` `poll` `getsockopt`; under TLS `sendto` |
//! | `pf-recv-i` | `recvmsg` `recvfrom` `futex` `write` `getrusage` `mincore` `fallocate`; under TLS `sendto` |
//! | `pf-pause` | `poll` `read` `write` `sendto` `recvfrom` `futex`; where a connection is lost meanwhile, `eventfd2` `clone3` `shutdown` `close` `fcntl` `getsockopt` `setsockopt` `getsockname` `getpeername` |
//! | `pf-scan` | `poll` `read` `write` `sendto` `recvfrom` `futex` `ioctl` `sched_yield`; where a connection is lost meanwhile, `eventfd2` `clone3` `shutdown` `close` `fcntl` `getsockopt` `setsockopt` `getsockname` `getpeername` |
//! | `pf-dial-i` | `socket` `connect` `poll` `read` `write` `getsockopt` `setsockopt` `fcntl` `sendto` `futex` `close`; for a name, `clone3`; under TLS `recvfrom` `getrandom` |
//! | `pf-hash`, `pf-hash-i` | `clone3` `futex` `write` |
//! | `pf-resolve` | what the system's resolver likes |
//! | the caller's, source | `socket` `connect` `getsockname` `getpeername` `getsockopt` `setsockopt` `fcntl` `eventfd2` `getrandom` `clone3` `poll` `read` `write` `sendto` `recvfrom` `futex` `shutdown` `close` `openat` `ioctl` `lseek` `sched_yield` `userfaultfd` |
//! | the caller's, target | `socket` `bind` `listen` `getsockname` `getpeername` `accept4` `unlink` `getsockopt` `setsockopt` `fcntl` `eventfd2` `getrandom` `clone3` `poll` `read` `write` `sendto` `recvfrom` `futex` `shutdown` `close` `openat` `ioctl` `lseek` `madvise` `fallocate` `fstatfs` |
//!
//! [`settle`](crate::settle::settle) and a [`Witness`](crate::target::Witness) run on the thread that calls them, start none
//! but `pf-resolve`, and make no other calls than the caller's thread at a source and at a target.
//!
//! `write` and `read` go to eventfds only, but for those of the allocator. The requests of `ioctl`, by what is used:
//!
//! | for | requests |
//! |---|---|
//! | which pages exist, in round 0 and when a target's memory is made zero | PAGEMAP_SCAN 0xc0606610 on /proc/self/pagemap |
//! | `WriteProtect` | the same, and USERFAULTFD_IOC_NEW 0xaa00 on /dev/userfaultfd (or the system call), UFFDIO_API 0xc018aa3f, UFFDIO_REGISTER 0xc020aa00, UFFDIO_UNREGISTER 0x8010aa01, UFFDIO_WRITEPROTECT 0xc018aa06 |
//! | KVM's log | KVM_CHECK_EXTENSION 0xae03, KVM_ENABLE_CAP 0x4068aea3, KVM_GET_DIRTY_LOG 0x4010ae42, KVM_CLEAR_DIRTY_LOG 0xc018aec0; KVM_SET_USER_MEMORY_REGION 0x4020ae46, unless the VMM's own callback makes it |
//! | KVM's rings | the same without GET and CLEAR (on Arm with GET), and KVM_RESET_DIRTY_RINGS 0xaec7; `mmap` `madvise` `munmap` when the source is made and dropped; in a vCPU's thread that relieves its ring the reset, `rt_sigprocmask` and `sched_yield` |
//! | listening | FIONBIO 0x5421 |
//!
//! Where a jail forbids some of it: open what tracking needs before entering ([`WriteProtect::new`](crate::WriteProtect)
//! opens its files and keeps them), hand out sockets made elsewhere through a [`Connector`](crate::net::Connector) or
//! `connections`. Without /proc, every page counts as existing, which is slower and not wrong.
//!
//! # Signals
//!
//! Every thread of ours blocks all signals but those that it can raise itself (SIGBUS, SIGSEGV, SIGILL, SIGFPE): none of
//! them takes what is meant for the VMM, the kick of a vCPU for one. No handler is installed and no disposition changed.
//!
//! - **SIGPIPE** does not come: every send has MSG_NOSIGNAL.
//! - **SIGBUS** comes in `pf-send-i`, `pf-hash` or the caller's thread when guest RAM cannot be read: a file that was cut
//!   short, hugetlb or disk that has run out, poisoned memory. The VMM's handler decides, on that thread, as it would for
//!   a vCPU. Where the kernel itself meets such a page it is an error of the channel, and the migration fails. Under TLS the
//!   kernel meets none: `pf-send-i` and `pf-recv-i` copy pages themselves.
//! - **SIGSYS** is blocked: under SECCOMP_RET_TRAP a call that the list lacks ends the process at once, and no handler
//!   is asked. A start hook may unblock it.
//!
//! # Fork
//!
//! All descriptors are close-on-exec: fork and exec of a helper is harmless at any time. A child that goes on without exec
//! has none of our threads, and must not call into `migrate`'s objects. It holds copies of the sockets: we end connections
//! by shutdown(2), which no copy outlives, and a peer notices. And it makes the next write to every page of private guest
//! memory copy it.
//!
//! # Memory
//!
//! For guest RAM of `P` tracking pages and `N` channels, in bytes:
//!
//! ```text
//! source:  P * (8 + 5/8)  +  P * page size / 2 MiB * 8  +  N * 1.75 MB  +  up to 16 MiB of device state on its way
//! target:  P * (8 + 2/8)  +  P * page size / 2 MiB * 8  +  N * 0.06 MB  +  all device state until it is loaded
//! ```
//!
//! 8 bytes a page are the digest table, which `Verify::Off` does without, and of which only the part is resident whose
//! pages have travelled. The bits are bitmaps: four of the scanner's and one of the dirty source's; at the target, what
//! has landed and what was named. `RegionBitmaps` takes two more while a round begins, beside the VMM's own. Per channel it
//! is a ring and a journal of 65,536 items. `save_state` may run ahead of the link, and then what it writes waits in
//! memory, all of it if need be; a target keeps no more than
//! [`state_bytes_max`](crate::target::TargetBuilder::state_bytes_max).
//!
//! A guest of 64 GiB in pages of 4 KiB, 4 channels, [`Verify::Wire`](crate::Verify): by the formula 152.0 MB at the source
//! and 138.9 MB at the target; measured, as the most that was allocated at one time, 151.97 and 138.96 MB.
//! Threads have std's stacks on top, 2 MiB of address space each, unless `Spawn` makes them otherwise.
//!
//! TLS adds some 0.3 MB a channel at either side. A target holds up to 512 connections that have not said who they are; each
//! takes 100 bytes and its socket, and under TLS up to 36 KiB and what rustls keeps of a handshake, some 20 KiB.
//!
//! Nothing is locked, and no memory is pinned but pages that go by reference and are on their way, to which the limit on
//! locked memory applies ([`ZeroCopy`](crate::ZeroCopy); none over loopback, Unix sockets, or with `Off`). A VMM that calls
//! mlockall(MCL_FUTURE) makes the whole table resident. Reading guest RAM brings back what was swapped out. A table that
//! does not fit fails the migration before it begins; where the rest cannot be had, the process aborts as with any
//! allocation in Rust.
//!
//! Guest RAM itself: a target makes the pages that packets name, and no others, by page faults or, where it sees those
//! (`prefaulted_bytes`), in batches before the content comes. Behind [huge pages](crate::memory::Backing) the kernel makes
//! the whole one for the first page in it. A block that says what file it shares
//! ([`with_shared_file`](crate::RamBlock::with_shared_file)) arrives faster: in a tmpfs, the file is asked for memory first.
//!
//! Descriptors: `N + 3` at the source (control connection, eventfd, page map) and `N + 3` at the target (listener, control
//! connection, eventfd), 2 for `WriteProtect`, 2 for each block of shared memory; while connections come in, the target
//! holds some more that it does not know yet, and 2 for each connection that a source makes again.
//!
//! # What must stay alive
//!
//! | what | until |
//! |---|---|
//! | the mappings of guest RAM | the last clone of the `Ram` is gone: give their owner to `RamBlock::with_keep_alive` or `Ram::with_keep_alive`; `GuestRam` does so |
//! | the dirty source, the hooks' object | `migrate` or `receive` has returned: the borrow checker sees to it |
//! | KVM slots, userfaultfd registrations, the page tables of guest RAM | the same: do not delete slots, remap or move guest RAM meanwhile |
//! | cancel handles, progress | as long as anybody likes: they are handles to counters, and harmless after the end |
//!
//! # Panics
//!
//! Nothing on the way of a page panics, whatever the peer sends. Should a worker panic all the same, it is caught, and is
//! the reason of a `Failed`; with `panic = "abort"` it ends the process. **A hook that panics** passes through `migrate` or
//! `receive`: all threads are joined and the connections closed on the way, so that the peer notices; but nobody calls
//! `resume` or `discard`, the dirty source stays armed, and what was harvested is not given back. From `run`, the
//! source's outcome is `Uncertain`.
//!
//! # Time limits
//!
//! [`Timeouts`](crate::Timeouts), all of which the VMM may set:
//!
//! | limit | default | for |
//! |---|---|---|
//! | `connect` | 10 s | each connection, the look-up of the name included |
//! | `hello` | 10 s | the peer's first words, Setup, every data channel to join, and a lost one to be retired |
//! | `silence` | 10 s | any sign of life; a Ping goes out every 200 ms |
//! | `hook` | 120 s | a hook of the other VMM, during which it may say nothing |
//! | `stall` | 10 s | anything to move while data is waiting to: 64 KiB on a lane that others wait for, a byte on any of them; and for a channel to come back where none is left |
//! | [`resume_window`](crate::source::SourceBuilder::resume_window) | 0 | the control connection to come back; not one of `Timeouts`, as both sides must have it |
//!
//! A target waits for its source without limit until it has connected; a cancel ends that. The VMM's own hooks have no
//! limit: whoever calls `cancel` while one runs has its answer at once, and the migration ends when the hook returns.
//! Otherwise a cancel, or a failure, ends everything within 100 ms, whatever the peer does: at most 50 of them go into
//! getting last words out. Only a page fault that the kernel is busy with is waited for.
