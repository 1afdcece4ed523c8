//! A VMM for tests: guest RAM that any thread may write, a dirty bitmap it marks, and hooks that record what happened.
// UNSAFETY: stands in for a guest, which writes its RAM whenever it likes.
#![allow(dead_code)]
#![expect(unsafe_code)]

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use pageferry::memory::{Backing, Initial};
use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::Setup;
use pageferry::{DirtyBitmap, Guest, HookError, Incoming, Ram, RamBlock, StateWriter};

/// Guest RAM of blocks of these many pages each.
pub fn ram(page_size: PageSize, pages: &[u64]) -> Ram {
    let blocks = pages.iter().enumerate().map(|(i, pages)| {
        let name = format!("ram{i}");
        let bytes = pages * page_size.bytes();
        RamBlock::anonymous(&name, (i as u64) << 40, bytes, page_size, Backing::Base).unwrap()
    });
    Ram::new(blocks).unwrap()
}

/// Writes a pattern of its own into a page.
pub fn write_page(ram: &Ram, block: BlockId, page: u64, version: u64) {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    for (i, at) in (0..range.len).step_by(8).enumerate() {
        let value = mix(version ^ (page << 20) ^ (u64::from(block.0) << 52) ^ i as u64);
        // SAFETY: inside the page, aligned; races with readers of guest RAM are what guest RAM is for.
        unsafe { AtomicU64::from_ptr(range.ptr.add(at).cast()).store(value, Ordering::Relaxed) };
    }
}

/// Zeroes a page.
pub fn zero_page(ram: &Ram, block: BlockId, page: u64) {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    for at in (0..range.len).step_by(8) {
        // SAFETY: as in `write_page`.
        unsafe { AtomicU64::from_ptr(range.ptr.add(at).cast()).store(0, Ordering::Relaxed) };
    }
}

/// The bytes of a page.
pub fn read_page(ram: &Ram, block: BlockId, page: u64) -> Vec<u8> {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    let mut bytes = Vec::with_capacity(range.len);
    for at in (0..range.len).step_by(8) {
        // SAFETY: as in `write_page`.
        let word = unsafe { AtomicU64::from_ptr(range.ptr.add(at).cast()).load(Ordering::Relaxed) };
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// The first page in which two memories differ.
pub fn first_difference(a: &Ram, b: &Ram) -> Option<(BlockId, u64)> {
    a.iter()
        .flat_map(|(id, block)| (0..block.pages()).map(move |page| (id, page)))
        .find(|&(id, page)| read_page(a, id, page) != read_page(b, id, page))
}

pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A guest that writes pages until it is paused, and marks them.
pub struct TestGuest {
    pub ram: Ram,
    pub dirty: DirtyBitmap,
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<()>>,
    pub state: Vec<u8>,
    pub setup: Vec<u8>,
    pub resumed: u32,
    pub paused: u32,
    /// Called in `save_state`, before the state is written.
    pub on_save: Option<Box<dyn FnMut(&Ram, &DirtyBitmap)>>,
}

impl TestGuest {
    pub fn new(ram: &Ram, dirty: &DirtyBitmap) -> TestGuest {
        TestGuest {
            ram: ram.clone(),
            dirty: dirty.clone(),
            stop: Arc::new(AtomicBool::new(false)),
            writer: None,
            state: b"device state".to_vec(),
            setup: b"machine".to_vec(),
            resumed: 0,
            paused: 0,
            on_save: None,
        }
    }

    /// Starts a vCPU that writes the first `hot` pages of block 0 over and over.
    pub fn start(&mut self, hot: u64) {
        self.stop.store(false, Ordering::Relaxed);
        let (ram, dirty, stop) = (self.ram.clone(), self.dirty.clone(), self.stop.clone());
        self.writer = Some(std::thread::spawn(move || {
            let mut version = 1u64;
            while !stop.load(Ordering::Relaxed) {
                let page = mix(version) % hot;
                if version % 5 == 0 {
                    zero_page(&ram, BlockId(0), page)
                } else {
                    write_page(&ram, BlockId(0), page, version)
                }
                // After the write: that is the contract.
                dirty.mark(BlockId(0), page);
                version += 1;
            }
        }));
    }

    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            writer.join().unwrap();
        }
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Guest for TestGuest {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(self.setup.clone())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.paused += 1;
        self.stop();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.resumed += 1;
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        if let Some(on_save) = &mut self.on_save {
            on_save(&self.ram, &self.dirty);
        }
        out.write_all(&self.state)?;
        Ok(())
    }
}

/// The VMM at the target.
pub struct TestIncoming {
    pub ram: Option<Ram>,
    /// Makes the memory for a block.
    pub make: Box<dyn FnMut(&str, u64, u64, PageSize) -> RamBlock + Send>,
    pub state: Vec<u8>,
    pub setup: Vec<u8>,
    pub runs: u32,
    pub discards: u32,
    pub refuse: Option<String>,
    pub fail_load: Option<String>,
    pub fail_run: Option<String>,
}

impl Default for TestIncoming {
    fn default() -> TestIncoming {
        TestIncoming {
            ram: None,
            make: Box::new(|name, gpa, bytes, page_size| {
                RamBlock::anonymous(name, gpa, bytes, page_size, Backing::Base).unwrap().with_initial(Initial::Zeroed)
            }),
            state: Vec::new(),
            setup: Vec::new(),
            runs: 0,
            discards: 0,
            refuse: None,
            fail_load: None,
            fail_run: None,
        }
    }
}

impl Incoming for TestIncoming {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        self.setup = setup.opaque.clone();
        if let Some(why) = &self.refuse {
            return Err(why.clone().into());
        }
        let blocks: Vec<_> =
            setup.blocks.iter().map(|b| (self.make)(&b.name, b.guest_address, b.bytes, b.page_size)).collect();
        let ram = Ram::new(blocks)?;
        self.ram = Some(ram.clone());
        Ok(ram)
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        state.read_to_end(&mut self.state)?;
        match &self.fail_load {
            Some(why) => Err(why.clone().into()),
            None => Ok(()),
        }
    }

    fn run(&mut self) -> Result<(), HookError> {
        self.runs += 1;
        match &self.fail_run {
            Some(why) => Err(why.clone().into()),
            None => Ok(()),
        }
    }

    fn discard(&mut self) {
        self.discards += 1;
    }
}
