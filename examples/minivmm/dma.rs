//! The part of the device that writes guest RAM by itself, as a disk or a network card does: KVM knows nothing of it.
//!
//! It goes through vm-memory, which marks each page in its bitmap after it was written. Each write has a number, and the
//! next number is device state: so what every page must hold is known, and checked.
#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::guest::{Config, Memory, PAGE};

/// How long it rests after each page.
const REST: Duration = Duration::from_millis(1);

/// Writes until it is dropped, whenever it is running.
pub struct Dma {
    engine: Arc<Engine>,
    thread: Option<JoinHandle<()>>,
}

struct Engine {
    config: Config,
    memory: Arc<Memory>,
    /// Held during each write: who has it and says "not running" knows that no write is under way.
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    /// The number of the next write.
    next: u64,
    running: bool,
    ended: bool,
    /// It was loaded, and has not looked yet whether its writes arrived: it does before it writes over them.
    unchecked: bool,
    error: Option<String>,
}

impl Dma {
    /// An engine at rest, which wrote each of its pages once.
    pub fn new(config: &Config, memory: Arc<Memory>) -> io::Result<Dma> {
        let inner = Inner { next: config.device_pages(), running: false, ended: false, unchecked: false, error: None };
        let engine =
            Arc::new(Engine { config: config.clone(), memory, inner: Mutex::new(inner), changed: Condvar::new() });
        let thread = thread::Builder::new().name("dma".to_owned()).spawn({
            let engine = Arc::clone(&engine);
            move || engine.run()
        })?;
        Ok(Dma { engine, thread: Some(thread) })
    }

    /// Puts into each page what its last write would have put there; before the guest runs for the first time.
    pub fn fill(&self) -> Result<(), GuestMemoryError> {
        (0..self.engine.config.device_pages()).try_for_each(|number| self.engine.put(number))
    }

    /// Lets it write, or stops it: when this returns no write is under way.
    pub fn set_running(&self, running: bool) {
        self.engine.lock().running = running;
        self.engine.changed.notify_all();
    }

    /// Writes what it still held back, as a device that is asked for its state may: after vCPUs and DMA were stopped.
    pub fn flush(&self) -> Result<(), GuestMemoryError> {
        self.engine.write(&mut self.engine.lock())
    }

    /// The number of the next write: all of its state.
    pub fn next(&self) -> u64 {
        self.engine.lock().next
    }

    /// Becomes what it was at the source.
    pub fn load(&self, next: u64) -> Result<(), String> {
        if next < self.engine.config.device_pages() {
            return Err(format!("the device cannot have made {next} writes: not each of its pages is written"));
        }
        let mut inner = self.engine.lock();
        (inner.next, inner.unchecked) = (next, true);
        Ok(())
    }

    /// Compares every page that it writes with the last write to it.
    pub fn check(&self) -> Result<(), String> {
        let inner = self.engine.lock();
        match &inner.error {
            Some(why) => Err(why.clone()),
            None => self.engine.check(inner.next),
        }
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        self.engine.lock().ended = true;
        self.engine.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is written, at the start and at the end of the page: the number of the write, and where it goes.
const RECORD: usize = 16;

fn last_record(page: GuestAddress) -> GuestAddress {
    GuestAddress(page.0 + PAGE - RECORD as u64)
}

impl Engine {
    fn run(&self) {
        let mut inner = self.lock();
        while !inner.ended {
            if inner.running && inner.error.is_none() {
                let checked = if inner.unchecked { self.check(inner.next) } else { Ok(()) };
                inner.unchecked = false;
                inner.error = checked.and_then(|()| self.write(&mut inner).map_err(|e| e.to_string())).err();
                inner = self.changed.wait_timeout(inner, REST).unwrap_or_else(PoisonError::into_inner).0;
            } else {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn write(&self, inner: &mut Inner) -> Result<(), GuestMemoryError> {
        self.put(inner.next)?;
        inner.next += 1;
        Ok(())
    }

    fn put(&self, number: u64) -> Result<(), GuestMemoryError> {
        let (address, record) = self.record(number);
        self.memory.write_slice(&record, address)?;
        self.memory.write_slice(&record, last_record(address))
    }

    fn check(&self, next: u64) -> Result<(), String> {
        for number in next - self.config.device_pages()..next {
            let (address, expected) = self.record(number);
            for at in [address, last_record(address)] {
                let mut found = [0; RECORD];
                self.memory.read_slice(&mut found, at).map_err(|e| e.to_string())?;
                if found != expected {
                    let found = u64::from_le_bytes(found[..8].try_into().unwrap_or_default());
                    return Err(format!("its write {number} to {:#x} is not there, but {found}", at.0));
                }
            }
        }
        Ok(())
    }

    /// Where the write of this number goes, and what it is.
    fn record(&self, number: u64) -> (GuestAddress, [u8; RECORD]) {
        let address = self.config.device_page(number % self.config.device_pages());
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&number.to_le_bytes());
        record[8..].copy_from_slice(&address.0.to_le_bytes());
        (address, record)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
