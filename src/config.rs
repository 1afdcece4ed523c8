#![forbid(unsafe_code)]
//! What source and target are told: CPUs, threads, how pages reach the kernel, and how long to wait for what.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::crew::{Spawn, StartError, StartHook, Starting, StdSpawn};
use crate::error::Failure;
use crate::sys;
use crate::sys::socket::Socket;

/// Where workers run.
///
/// Worker `i` is pinned to CPU `i % n` of the list. What each obtained is in the report.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Pin {
    /// Wherever the scheduler puts them, but for one case: the peer is on this host, and the threads that ship, one on
    /// each side of each channel, outnumber the CPUs that this process may use. Then both ends of a channel share a CPU
    /// and take turns on it, a batch at a time: what one end has put into the socket, the other finds in the cache, and
    /// neither has to be woken on another CPU.
    #[default]
    Auto,
    /// Wherever the scheduler puts them.
    Off,
    /// On these CPUs where that can be had; elsewhere otherwise.
    BestEffort(Vec<usize>),
    /// On these CPUs, or the migration does not start.
    Required(Vec<usize>),
}

/// Whether a source hands pages to the kernel by reference (MSG_ZEROCOPY) rather than have it copy them.
///
/// **It pays** across machines where copying is what a sending CPU has no time for: links of 25 Gbit/s and more, few
/// channels, full pages rather than scattered ones (the kernel looks up and holds each page, which a copy of 4 KiB hardly
/// exceeds), and a network card that gathers and checksums by itself (`ethtool -k`: scatter-gather, tx-checksumming). With
/// a checksum of the kernel's, a packet whose page the guest writes meanwhile arrives damaged and is sent once more.
/// **It does not pay** over loopback, between network namespaces and to most virtual cards: there the kernel copies after
/// all, later and from a colder cache. The target copies as ever. Payloads of less than 32 KiB are always copied.
///
/// # Locked memory
/// Pages that are on their way are pinned, and count against RLIMIT_MEMLOCK, for all processes of the user together: up to
/// what the channels' send buffers hold, mostly 4 MiB each (`net.ipv4.tcp_wmem`), and never more than 32 MiB each. The
/// usual limit is 8 MiB, and was 64 KiB before Linux 5.16: raise it for more than one channel, or have CAP_IPC_LOCK.
/// What the limit refuses is copied; a channel that is refused eight times running copies from then on.
///
/// # What it does not change
/// The kernel reads a page later than it was handed over. What the guest wrote in between travels, and travels again, as
/// the page is dirty; digests are those of what is sent in the end. A round counts as sent, and a channel says its Bye,
/// only when the kernel needs no page any more. A failed or cancelled migration does not wait for that: the kernel holds
/// the pages by itself, so that the mapping may go at once. Until the connection is gone it may send what these pages
/// hold by then, to nobody but the target that was to have them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ZeroCopy {
    /// On TCP connections to other hosts, and there until the kernel says of two sends running that it copied them.
    #[default]
    Auto,
    /// On every channel, also where the kernel copies after all. The migration fails where it cannot be had: on a Unix
    /// socket, and before Linux 4.14.
    On,
    /// Never.
    Off,
}

/// Why a channel copies pages, from the start or from some time on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum WhyCopied {
    /// It was asked to: [`ZeroCopy::Off`].
    Asked,
    /// Its connection is not TCP.
    NotTcp,
    /// Its peer is on this host, where the kernel would copy after all.
    PeerIsHere,
    /// It is encrypted by this process, which has to read every byte.
    Encrypted,
    /// The kernel does not allow it on this socket.
    Kernel,
    /// The kernel copied after all.
    AfterAll,
    /// The kernel may hold no more memory, again and again: RLIMIT_MEMLOCK or `net.core.optmem_max`.
    NoMemory,
    /// The kernel has no pages to hold behind guest RAM, again and again: it is memory of a device.
    NoPages,
}

impl WhyCopied {
    /// The word for reports.
    pub fn word(self) -> &'static str {
        match self {
            WhyCopied::Asked => "asked",
            WhyCopied::NotTcp => "not-tcp",
            WhyCopied::PeerIsHere => "peer-is-here",
            WhyCopied::Encrypted => "encrypted",
            WhyCopied::Kernel => "kernel",
            WhyCopied::AfterAll => "after-all",
            WhyCopied::NoMemory => "no-memory",
            WhyCopied::NoPages => "no-pages",
        }
    }

    /// Whether it came up only while pages travelled.
    pub fn came_later(self) -> bool {
        matches!(self, WhyCopied::AfterAll | WhyCopied::NoMemory | WhyCopied::NoPages)
    }
}

impl fmt::Display for WhyCopied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WhyCopied::Asked => "it was asked to",
            WhyCopied::NotTcp => "its connection is not TCP",
            WhyCopied::PeerIsHere => "its peer is on this host",
            WhyCopied::Encrypted => "it is encrypted (TLS)",
            WhyCopied::Kernel => "the kernel does not allow it on this socket",
            WhyCopied::AfterAll => "the kernel copied after all",
            WhyCopied::NoMemory => "the kernel may hold no more memory (see ulimit -l)",
            WhyCopied::NoPages => "guest RAM has no pages that the kernel could hold",
        })
    }
}

/// How long the library waits for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// For each connection to be made.
    pub connect: Duration,
    /// For the Hello on a connection, and for Setup after it.
    pub hello: Duration,
    /// For any sign of life on the control connection, which carries one every [`HEARTBEAT`].
    pub silence: Duration,
    /// For the hooks of the VMM at the other side, during which it may say nothing.
    pub hook: Duration,
    /// For anything to move while data is waiting to.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        let seconds = Duration::from_secs;
        Timeouts {
            connect: seconds(10),
            hello: seconds(10),
            silence: seconds(10),
            hook: seconds(120),
            stall: seconds(10),
        }
    }
}

impl Timeouts {
    /// None longer than a year, so that a deadline is always a time that the clock can show.
    pub(crate) fn bounded(self) -> Timeouts {
        let Timeouts { connect, hello, silence, hook, stall } = self;
        Timeouts {
            connect: connect.min(YEAR),
            hello: hello.min(YEAR),
            silence: silence.min(YEAR),
            hook: hook.min(YEAR),
            stall: stall.min(YEAR),
        }
    }
}

/// Longer than anybody waits, and short enough to be added to any time that the clock can show.
pub(crate) const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// How often the source sends a Ping.
pub const HEARTBEAT: Duration = Duration::from_millis(200);

/// What crews on both sides are made with.
#[derive(Clone)]
pub(crate) struct CrewOptions {
    pub pin: Pin,
    pub spawn: Arc<dyn Spawn>,
    pub hook: Option<Arc<StartHook>>,
}

impl Default for CrewOptions {
    fn default() -> CrewOptions {
        CrewOptions { pin: Pin::Auto, spawn: Arc::new(StdSpawn), hook: None }
    }
}

impl fmt::Debug for CrewOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrewOptions").field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl CrewOptions {
    /// Where so many workers are to run. Their start hook pins each, then runs the VMM's own hook (a seccomp filter,
    /// which may forbid pinning, comes after it).
    pub fn place(&self, workers: usize, peer: Peer) -> Result<Placement, Failure> {
        // Asked for here, once: the answer depends on the calling thread's mask, which pinned threads have lost.
        let there = core_affinity::get_core_ids().unwrap_or_default();
        let all: Vec<_> = there.iter().map(|id| id.id).collect();
        let (cpus, required) = match &self.pin {
            Pin::Auto if share_cpus(workers, peer, all.len()) => (&all[..], false),
            Pin::Auto | Pin::Off => (&[][..], false),
            Pin::BestEffort(cpus) => (&cpus[..], false),
            Pin::Required(cpus) => (&cpus[..], true),
        };
        if let Some(missing) = cpus.iter().find(|cpu| !there.iter().any(|id| id.id == **cpu)) {
            if required {
                let have: Vec<_> = there.iter().map(|id| id.id.to_string()).collect();
                return Err(Failure::Config(format!(
                    "CPU {missing} is not available to this process; it may use {}",
                    have.join(", ")
                )));
            }
        }
        let wanted: Vec<_> = cpus.iter().map(|cpu| there.iter().find(|id| id.id == *cpu).copied()).collect();
        let takes_turns = peer == Peer::SameHost && !wanted.is_empty();
        let options = self.clone();
        let start: Arc<StartHook> = Arc::new(move |starting: &Starting<'_>| {
            let mut cpu = None;
            if !wanted.is_empty() {
                let core = wanted[starting.id % wanted.len()];
                if core.is_some_and(core_affinity::set_for_current) {
                    cpu = sys::thread::current_cpu();
                } else if required {
                    return Err(StartError::new("pin to its CPU", std::io::Error::last_os_error()));
                }
            }
            options.own_hook(starting)?;
            Ok(cpu)
        });
        Ok(Placement { start, takes_turns })
    }

    /// The VMM's own hook alone.
    pub fn own_hook(&self, starting: &Starting<'_>) -> Result<(), StartError> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(starting).map(drop))
    }
}

/// Where the other side is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Peer {
    /// On the same CPUs, more likely than not.
    SameHost,
    /// Beyond a network.
    Elsewhere,
}

impl Peer {
    /// Of these connections: on this host if every one of them is.
    pub fn of<'a>(sockets: impl IntoIterator<Item = &'a Socket>) -> Peer {
        if sockets.into_iter().all(Socket::is_within_host) { Peer::SameHost } else { Peer::Elsewhere }
    }
}

/// How workers start, and how they get along.
pub(crate) struct Placement {
    /// What each does first.
    pub start: Arc<StartHook>,
    /// Whether a worker offers its CPU after each batch: it may be the one on which the other end waits.
    pub takes_turns: bool,
}

/// Whether both ends of a channel are to share a CPU. Both sides decide alike where they may use the same CPUs, and
/// number them alike; where they may not, all that is lost is the gain.
fn share_cpus(workers: usize, peer: Peer, cpus: usize) -> bool {
    peer == Peer::SameHost && 2 * workers > cpus
}

/// A list of CPUs as people write it: `0,2-5`.
///
/// ```
/// assert_eq!(pageferry::config::parse_cpus("0,2-4").unwrap(), [0, 2, 3, 4]);
/// assert!(pageferry::config::parse_cpus("4-2").is_err());
/// ```
///
/// # Errors
/// [`Failure::Config`], with the part that is no CPU.
pub fn parse_cpus(text: &str) -> Result<Vec<usize>, Failure> {
    // As many as a cpu_set_t holds.
    const CPUS_MAX: usize = 1024;
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let bad = || Failure::Config(format!("{part:?} is no CPU or range of CPUs; write for example 0,2-5"));
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (first.trim().parse().map_err(|_| bad())?, last.trim().parse().map_err(|_| bad())?),
            None => {
                let cpu: usize = part.trim().parse().map_err(|_| bad())?;
                (cpu, cpu)
            }
        };
        if first > last || last >= CPUS_MAX {
            return Err(bad());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_pinning_names_the_cpu_that_is_not_there() {
        let options = CrewOptions { pin: Pin::Required(vec![0, 1023]), ..CrewOptions::default() };
        let Err(why) = options.place(1, Peer::Elsewhere) else { panic!("CPU 1023 was accepted") };
        assert!(why.to_string().contains("CPU 1023"), "{why}");
    }

    #[test]
    fn best_effort_takes_what_it_can_get_and_says_so() {
        let options = CrewOptions { pin: Pin::BestEffort(vec![0, 1023]), ..CrewOptions::default() };
        let hook = options.place(2, Peer::Elsewhere).unwrap().start;
        let on = |id| std::thread::scope(|s| s.spawn(|| hook(&Starting { kind: "t", id, name: "t" })).join().unwrap());
        assert_eq!(on(0).unwrap(), Some(0));
        assert_eq!(on(1).unwrap(), None);
    }

    #[test]
    fn both_ends_of_a_channel_share_a_cpu_only_on_one_host_that_has_too_few() {
        assert!(share_cpus(2, Peer::SameHost, 2));
        assert!(share_cpus(1, Peer::SameHost, 1));
        assert!(!share_cpus(1, Peer::SameHost, 2), "each end has a CPU of its own");
        assert!(!share_cpus(4, Peer::SameHost, 8));
        assert!(share_cpus(5, Peer::SameHost, 8));
        assert!(!share_cpus(64, Peer::Elsewhere, 2), "the other end is not here");
    }

    #[test]
    fn workers_that_share_cpus_are_spread_over_all_and_take_turns() {
        let cpus = core_affinity::get_core_ids().unwrap();
        let options = CrewOptions::default();
        let place = options.place(cpus.len(), Peer::SameHost).unwrap();
        assert!(place.takes_turns);
        for (id, cpu) in cpus.iter().enumerate() {
            let start = || (place.start)(&Starting { kind: "t", id, name: "t" });
            assert_eq!(std::thread::scope(|s| s.spawn(start).join().unwrap()).unwrap(), Some(cpu.id));
        }
        let off = CrewOptions { pin: Pin::Off, ..CrewOptions::default() };
        assert!(!off.place(cpus.len(), Peer::SameHost).unwrap().takes_turns);
        assert!(!options.place(cpus.len(), Peer::Elsewhere).unwrap().takes_turns);
    }

    #[test]
    fn cpu_lists_that_make_no_sense_are_refused() {
        for bad in ["", "a", "1-", "-", "3-1", "0,,1", "0-99999999999"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }
}
