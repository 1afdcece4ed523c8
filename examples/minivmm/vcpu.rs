//! The vCPUs: a thread each, that runs the guest and answers its ports.

// UNSAFETY: `immediate_exit` is set from outside a vCPU's thread, in memory shared with the kernel.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::control::Control;
use crate::device::Device;
use crate::guest::port;

/// What gets the entries out of dirty rings, when a vCPU cannot go on because its own is full.
pub type RingRelief = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What a vCPU is ahead of the clock before it waits: a sleep costs more than a tick.
const WAIT_MIN: Duration = Duration::from_micros(500);

/// What the threads share.
struct Shared {
    control: Control,
    device: Arc<Device>,
    tick_time: Duration,
    relief: OnceLock<RingRelief>,
    vcpus: Vec<Vcpu>,
    /// Set once, before the first vCPU may be let in.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Vcpu {
    /// Held by its thread while that is inside.
    fd: Mutex<VcpuFd>,
    raw_fd: RawFd,
    immediate_exit: ImmediateExit,
}

/// All vCPUs of a VM. Dropping it ends their threads.
pub struct Vcpus {
    shared: Arc<Shared>,
    throttle: Option<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts their threads, which stay outside.
    pub fn start(fds: Vec<VcpuFd>, device: Arc<Device>, tick_time: Duration) -> io::Result<Vcpus> {
        register_signal_handler(SIGRTMIN(), interrupt).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        let of = |mut fd: VcpuFd| {
            let immediate_exit = ImmediateExit(&raw mut fd.get_kvm_run().immediate_exit);
            Vcpu { raw_fd: fd.as_raw_fd(), fd: Mutex::new(fd), immediate_exit }
        };
        let vcpus: Vec<_> = fds.into_iter().map(of).collect();
        let (control, relief, threads) = (Control::new(), OnceLock::new(), Mutex::default());
        let shared = Arc::new(Shared { control, device, tick_time, relief, vcpus, threads });
        // From here on a failure drops this, which ends the threads that there are.
        let mut all = Vcpus { shared: Arc::clone(&shared), throttle: None };
        for id in 0..shared.vcpus.len() {
            let shared = Arc::clone(&all.shared);
            let thread = thread::Builder::new().name(format!("vcpu-{id}")).spawn(move || shared.run(id))?;
            all.shared.threads().push(thread);
        }
        let throttle = move || shared.control.run_throttle(&|| shared.kick());
        all.throttle = Some(thread::Builder::new().name("throttle".to_owned()).spawn(throttle)?);
        Ok(all)
    }

    pub fn resume(&self) {
        self.shared.control.resume();
    }

    /// Returns when no vCPU runs and each stands between two instructions, with no port access half done.
    pub fn pause(&self) {
        self.shared.control.pause(&|| self.shared.kick());
    }

    /// From now on they run `100 - percent` of the time.
    pub fn throttle(&self, percent: u8) {
        self.shared.control.throttle(percent);
    }

    /// Says what to do when a dirty ring is full; before they run for the first time, and once.
    pub fn set_relief(&self, relief: RingRelief) {
        let _ = self.shared.relief.set(relief);
    }

    /// Why one of them cannot go on, if that has happened.
    pub fn broken(&self) -> Option<String> {
        self.shared.control.broken()
    }

    /// The vCPUs themselves. Blocks while they are not paused.
    pub fn fds(&self) -> impl Iterator<Item = MutexGuard<'_, VcpuFd>> {
        self.shared.vcpus.iter().map(|vcpu| vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Their file descriptors, for what needs no more, also while they run.
    pub fn raw_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        // SAFETY: the descriptor is open for as long as its VcpuFd is there, which `self` holds.
        self.shared.vcpus.iter().map(|vcpu| unsafe { BorrowedFd::borrow_raw(vcpu.raw_fd) })
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.control.end(&|| self.shared.kick());
        let threads: Vec<_> = self.shared.threads().drain(..).chain(self.throttle.take()).collect();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A vCPU's thread.
    fn run(&self, id: usize) {
        // Where vCPUs take all CPUs, going first would leave none for the threads that ship.
        if thread::available_parallelism().is_ok_and(|cpus| self.vcpus.len() < cpus.get()) {
            go_first();
        }
        let vcpu = &self.vcpus[id];
        while self.control.wait_to_enter(|| vcpu.immediate_exit.set(false)) {
            let mut fd = vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(why) = self.run_guest(id, &mut fd) {
                self.control.break_down(format!("vCPU {id}: {why}"));
                self.device.give_up();
            }
            drop(fd);
            self.control.left();
        }
    }

    /// Runs the guest until it is kicked out.
    ///
    /// The only way out is KVM_RUN's EINTR, and that is no matter of taste. A port access that came out as an exit is not
    /// over: the kernel finishes it (moves what was read into its register, steps over the instruction) when KVM_RUN is
    /// called *again*. A vCPU that left in between would be saved in front of its IN or OUT, and do it a second time at
    /// the target: a packet sent twice, a character read and lost. (Where KVM emulates the guest it has stepped over an
    /// OUT already, so that only INs show it.) With `immediate_exit` set, the next KVM_RUN finishes the access, runs
    /// nothing, and says EINTR.
    fn run_guest(&self, id: usize, fd: &mut VcpuFd) -> Result<(), String> {
        let mut next_tick = Instant::now();
        loop {
            match fd.run() {
                Ok(VcpuExit::IoOut(at, data)) => {
                    let value = data.try_into().map(u32::from_le_bytes);
                    if !value.is_ok_and(|value| self.device.out(id, at, value)) {
                        return Err(format!("OUT of {} bytes to port {at:#x}", data.len()));
                    }
                }
                Ok(VcpuExit::IoIn(at, data)) => {
                    let answer = match at {
                        port::COMMAND => self.device.command(id),
                        port::WAIT => {
                            // A guest that comes late makes up for little of it; short waits are saved up.
                            let now = Instant::now();
                            next_tick = (next_tick + self.tick_time).max(now - WAIT_MIN.min(self.tick_time));
                            if next_tick > now + WAIT_MIN {
                                self.control.wait_inside(next_tick);
                            }
                            0
                        }
                        _ => return Err(format!("IN of {} bytes from port {at:#x}", data.len())),
                    };
                    data.copy_from_slice(&answer.to_le_bytes()[..data.len()]);
                }
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => match self.relief.get() {
                    Some(relieve) => relieve().map_err(|e| format!("its dirty ring cannot be emptied: {e}"))?,
                    None => return Err("its dirty ring is full, and nobody empties it".to_owned()),
                },
                Ok(exit) => return Err(format!("the guest came out with {exit:?}")),
                Err(e) if e.errno() == libc::EINTR => return Ok(()),
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(e) => return Err(format!("KVM_RUN: {e}")),
            }
        }
    }

    /// Gets every vCPU out of the guest, and keeps those out that are about to go in: whoever is not in KVM_RUN yet finds
    /// `immediate_exit` set, whoever is in it is interrupted by the signal.
    fn kick(&self) {
        for (vcpu, thread) in self.vcpus.iter().zip(self.threads().iter()) {
            vcpu.immediate_exit.set(true);
            // Fails only for a thread that has ended.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets the guest go before whatever else this process does, as far as the process may: shipping its RAM must not keep it
/// waiting for a CPU.
fn go_first() {
    const NICE: libc::c_int = -15;
    // SAFETY: takes no pointer; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// Does nothing: it is the interruption that counts.
extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The byte in a vCPU's `kvm_run` that makes KVM_RUN come back before it runs anything.
struct ImmediateExit(*mut u8);

// SAFETY: the byte is only ever accessed as an atomic, by `set`.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn set(&self, exit: bool) {
        // SAFETY: the VcpuFd beside this in `Vcpu` keeps the page mapped, and moves no byte of it. kvm-ioctls does not
        // touch this one unless asked to.
        let byte = unsafe { AtomicU8::from_ptr(self.0) };
        // Relaxed: a thread that is kicked is either in KVM_RUN, and the signal gets it out, or enters it later, and a
        // system call lies between on both sides.
        byte.store(exit.into(), Ordering::Relaxed);
    }
}
