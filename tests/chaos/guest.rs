//! A guest that keeps writing, whose VMMs agree on one word that says who runs it.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::Setup;
use pageferry::{DirtyBitmap, Guest, HookError, Incoming, Ram, StateWriter};

use crate::plan::GuestPlan;
use crate::proxy::{Phase, Shared};
use crate::vmm::{self, mix};

const AT_SOURCE: u32 = 1;
const AT_TARGET: u32 = 2;

/// Who runs the guest, a bit for each side. Whoever starts it looks whether the other has it. Relaxed is enough: it is one
/// word, and all changes of one word have one order.
#[derive(Debug, Default)]
pub struct Owner {
    word: AtomicU32,
    complaints: Mutex<Vec<&'static str>>,
}

impl Owner {
    fn takes(&self, side: u32) {
        if self.word.fetch_or(side, Ordering::Relaxed) & !side != 0 {
            self.complain("the guest runs on both sides");
        }
    }

    fn leaves(&self, side: u32) {
        self.word.fetch_and(!side, Ordering::Relaxed);
    }

    fn complain(&self, what: &'static str) {
        self.complaints.lock().unwrap().push(what);
    }

    pub fn is_at_source(&self) -> bool {
        self.word.load(Ordering::Relaxed) == AT_SOURCE
    }

    pub fn is_at_target(&self) -> bool {
        self.word.load(Ordering::Relaxed) == AT_TARGET
    }

    pub fn complaints(&self) -> Vec<&'static str> {
        self.complaints.lock().unwrap().clone()
    }
}

/// The guest at the source.
pub struct ChaosGuest {
    pub ram: Ram,
    pub dirty: DirtyBitmap,
    /// A copy of RAM, as it was when the device state had been saved last.
    pub frozen: Ram,
    pub state: Vec<u8>,
    pub owner: Arc<Owner>,
    pub paused: u32,
    pub resumed: u32,
    plan: GuestPlan,
    seed: u64,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
    /// Whoever wants to know where the guest stands.
    pub watcher: Option<Arc<Shared>>,
}

/// Pages in the second block, which the device writes to as its state is saved.
const DEVICE_PAGES: u64 = 40;
const RAM: BlockId = BlockId(0);
const DEVICE: BlockId = BlockId(1);

impl ChaosGuest {
    /// A guest that runs. Some of its pages are zero, some were never touched.
    pub fn new(plan: GuestPlan, seed: u64) -> ChaosGuest {
        let pages = [plan.ram_mib * 256, DEVICE_PAGES];
        let ram = vmm::ram(PageSize::SIZE_4K, &pages);
        for page in 0..pages[0] {
            match page % 16 {
                5 => vmm::zero_page(&ram, RAM, page),
                11 => {}
                // Full pages cost an unoptimised build more than all the rest.
                0..=2 => vmm::write_page(&ram, RAM, page, seed),
                _ => vmm::poke_page(&ram, RAM, page, mix(seed ^ page)),
            }
        }
        let dirty = DirtyBitmap::for_ram(&ram);
        let state = (0..plan.state_bytes as u64).map(|i| mix(seed ^ (i >> 3)) as u8).collect();
        let owner = Arc::new(Owner::default());
        owner.takes(AT_SOURCE);
        let mut guest = ChaosGuest {
            frozen: vmm::ram(PageSize::SIZE_4K, &pages),
            ram,
            dirty,
            state,
            owner,
            paused: 0,
            resumed: 0,
            plan,
            seed,
            stop: Arc::new(AtomicBool::new(false)),
            writers: Vec::new(),
            watcher: None,
        };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.stop.store(false, Ordering::Relaxed);
        for writer in 0..self.plan.writers {
            let (plan, ram, dirty) = (self.plan, self.ram.clone(), self.dirty.clone());
            let (stop, owner) = (self.stop.clone(), self.owner.clone());
            let mut number = mix(self.seed ^ ((writer as u64) << 32) ^ u64::from(self.resumed));
            self.writers.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..plan.pages_per_ms {
                        number = mix(number.wrapping_add(1));
                        let page = number % plan.hot_pages;
                        match number % 32 {
                            1 => vmm::zero_page(&ram, RAM, page),
                            2..6 => vmm::write_page(&ram, RAM, page, number),
                            _ => vmm::poke_page(&ram, RAM, page, number),
                        }
                        // After the write: that is the contract.
                        dirty.mark(RAM, page);
                    }
                    if !owner.is_at_source() {
                        owner.complain("a vCPU of the source ran when it was not to");
                    }
                    thread::park_timeout(Duration::from_millis(1));
                }
            }));
        }
    }

    /// Stops the vCPUs, if they run.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.writers.iter().for_each(|writer| writer.thread().unpark());
        // One that panicked has said so, and writes no more.
        self.writers.drain(..).for_each(|writer| drop(writer.join()));
    }

    fn enter(&self, phase: Phase) {
        if let Some(watcher) = &self.watcher {
            watcher.enter(phase);
        }
    }
}

impl Drop for ChaosGuest {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Guest for ChaosGuest {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(self.seed.to_le_bytes().to_vec())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.paused += 1;
        self.stop();
        self.owner.leaves(AT_SOURCE);
        self.enter(Phase::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.enter(Phase::After);
        self.resumed += 1;
        self.owner.takes(AT_SOURCE);
        self.start();
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        for page in (self.paused as u64 % 3..DEVICE_PAGES).step_by(3) {
            vmm::write_page(&self.ram, DEVICE, page, self.seed + u64::from(self.paused));
            self.dirty.mark(DEVICE, page);
        }
        out.write_all(&self.state)?;
        vmm::copy_ram(&self.ram, &self.frozen);
        Ok(())
    }
}

/// The VMM at the target.
pub struct ChaosIncoming {
    pub ram: Option<Ram>,
    pub state: Vec<u8>,
    pub owner: Arc<Owner>,
    pub runs: u32,
    pub discards: u32,
    pub watcher: Option<Arc<Shared>>,
}

impl ChaosIncoming {
    pub fn new(owner: &Arc<Owner>) -> ChaosIncoming {
        ChaosIncoming { ram: None, state: Vec::new(), owner: owner.clone(), runs: 0, discards: 0, watcher: None }
    }
}

impl Incoming for ChaosIncoming {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        if self.ram.is_some() {
            self.owner.complain("prepare was called twice");
        }
        let pages: Vec<_> = setup.blocks.iter().map(|block| block.bytes / block.page_size.bytes()).collect();
        let ram = vmm::ram(PageSize::SIZE_4K, &pages);
        self.ram = Some(ram.clone());
        Ok(ram)
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        self.state.clear();
        state.read_to_end(&mut self.state)?;
        Ok(())
    }

    fn run(&mut self) -> Result<(), HookError> {
        self.runs += 1;
        self.owner.takes(AT_TARGET);
        if let Some(watcher) = &self.watcher {
            watcher.enter(Phase::After);
        }
        Ok(())
    }

    fn discard(&mut self) {
        self.discards += 1;
        if self.runs > 0 {
            self.owner.complain("discarded after it ran");
        }
    }
}
