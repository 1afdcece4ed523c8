#![forbid(unsafe_code)]
//! What source and target are told: CPUs, threads, and how long to wait for what.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::crew::{Spawn, StartError, StartHook, Starting, StdSpawn};
use crate::error::Failure;
use crate::sys;

/// Where workers run.
///
/// Worker `i` is pinned to CPU `i % n` of the list. What each obtained is in the report.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Pin {
    /// Wherever the scheduler puts them.
    #[default]
    Off,
    /// On these CPUs where that can be had; elsewhere otherwise.
    BestEffort(Vec<usize>),
    /// On these CPUs, or the migration does not start.
    Required(Vec<usize>),
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
        CrewOptions { pin: Pin::Off, spawn: Arc::new(StdSpawn), hook: None }
    }
}

impl fmt::Debug for CrewOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrewOptions").field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl CrewOptions {
    /// The start hook of every worker: pins it, then runs the VMM's own hook (a seccomp filter, which may forbid
    /// pinning, comes after it).
    pub fn start_hook(&self) -> Result<Arc<StartHook>, Failure> {
        let (cpus, required) = match &self.pin {
            Pin::Off => (&[][..], false),
            Pin::BestEffort(cpus) => (&cpus[..], false),
            Pin::Required(cpus) => (&cpus[..], true),
        };
        // Asked for here, once: the answer depends on the calling thread's mask, which pinned threads have lost.
        let there = core_affinity::get_core_ids().unwrap_or_default();
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
        let options = self.clone();
        Ok(Arc::new(move |starting: &Starting<'_>| {
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
        }))
    }

    /// The VMM's own hook alone.
    pub fn own_hook(&self, starting: &Starting<'_>) -> Result<(), StartError> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(starting).map(drop))
    }
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
        let Err(why) = options.start_hook() else { panic!("CPU 1023 was accepted") };
        assert!(why.to_string().contains("CPU 1023"), "{why}");
    }

    #[test]
    fn best_effort_takes_what_it_can_get_and_says_so() {
        let options = CrewOptions { pin: Pin::BestEffort(vec![0, 1023]), ..CrewOptions::default() };
        let hook = options.start_hook().unwrap();
        let on = |id| std::thread::scope(|s| s.spawn(|| hook(&Starting { kind: "t", id, name: "t" })).join().unwrap());
        assert_eq!(on(0).unwrap(), Some(0));
        assert_eq!(on(1).unwrap(), None);
    }

    #[test]
    fn cpu_lists_that_make_no_sense_are_refused() {
        for bad in ["", "a", "1-", "-", "3-1", "0,,1", "0-99999999999"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }
}
