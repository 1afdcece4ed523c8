//! The guest: its program, its memory map, and what every page of it holds before it runs.

// UNSAFETY: the guest's program is bytes between two symbols of an assembled section.
#![expect(unsafe_code)]

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest RAM. Every write through it marks its bitmap; what vCPUs write, KVM tells of.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;
const RAM_MIN: u64 = 4 * MIB;
const RAM_MAX: u64 = 1 << 40;
/// RAM above this lies above 4 GiB: the 32 MiB below are where a PC has its devices. KVM gives the page of the local APIC
/// there to no guest as RAM.
pub const LOW_MAX: u64 = FOUR_GIB - 32 * MIB;
pub const FOUR_GIB: u64 = 1 << 32;

/// What tells a vCPU what to do begins at 0.
const PROGRAM: u64 = PAGE;
const STACKS: u64 = 4 * PAGE;
/// The pages that the device writes go from here to the first unit.
const DEVICE: u64 = 8 * PAGE;
/// From here to the end of low RAM, in equal parts for the vCPUs: first the hot set of each, then its cold set.
const UNITS: u64 = 64 * PAGE;

pub const VCPUS_MAX: u64 = 4;
const UNIT_PAGES: u64 = 8;
pub const UNIT_BYTES: u64 = UNIT_PAGES * PAGE;
/// Added to what a page holds from one pass to the next: odd, so that 2^32 passes differ, and large, so that one page
/// is not mistaken for its neighbour of another pass.
const PASS_MIX: u32 = 0x1e37_79b1;
/// A power of two.
const TICKS_PER_COLD_UNIT: u32 = 32;
/// Units between two ticks, at most: about 100 us where each instruction costs 0.4 us.
const UNITS_A_TICK: u64 = 8;
/// The same for a guest that is tracked by dirty rings. See guest.s for why not more.
const UNITS_A_TICK_RING: u64 = 3;

/// Ports: four bytes wide, all of them.
pub mod port {
    /// OUT: a number, one more than the last.
    pub const TICK: u16 = 0x20;
    /// IN: 0 go on, 1 check all pages.
    pub const COMMAND: u16 = 0x21;
    /// IN: comes back when the vCPU may go on, by the clock.
    pub const WAIT: u16 = 0x22;
    /// OUT: the address of the first bad page, what it holds, what it should hold.
    pub const BAD_ADDRESS: u16 = 0x23;
    pub const BAD_FOUND: u16 = 0x24;
    pub const BAD_EXPECTED: u16 = 0x25;
    /// OUT: the check is over, and this many pages were good.
    pub const CHECKED: u16 = 0x26;
}

core::arch::global_asm!(
    include_str!("guest.s"),
    UNIT_PAGES = const UNIT_PAGES,
    UNIT_BYTES = const UNIT_BYTES,
    UNITS_A_TICK_RING = const UNITS_A_TICK_RING,
    PASS_MIX = const PASS_MIX,
    TICKS_PER_COLD_UNIT = const TICKS_PER_COLD_UNIT,
    HOT_START = const 4 * Parameter::HotStart as u8,
    HOT_END = const 4 * Parameter::HotEnd as u8,
    HOT_UNITS = const 4 * Parameter::HotUnits as u8,
    COLD_START = const 4 * Parameter::ColdStart as u8,
    COLD_END = const 4 * Parameter::ColdEnd as u8,
    COLD_SWEEP = const 4 * Parameter::ColdSweep as u8,
    WAIT = const 4 * Parameter::Wait as u8,
    PORT_TICK = const port::TICK,
    PORT_COMMAND = const port::COMMAND,
    PORT_WAIT = const port::WAIT,
    PORT_BAD_ADDRESS = const port::BAD_ADDRESS,
    PORT_BAD_FOUND = const port::BAD_FOUND,
    PORT_BAD_EXPECTED = const port::BAD_EXPECTED,
    PORT_CHECKED = const port::CHECKED,
);

unsafe extern "C" {
    safe static minivmm_guest_start: u8;
    safe static minivmm_guest_end: u8;
}

/// What a vCPU finds at `fs`, as words.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Parameter {
    HotStart,
    HotEnd,
    /// Units of the hot set before each tick.
    HotUnits,
    ColdStart,
    ColdEnd,
    /// Whether the cold set is written to.
    ColdSweep,
    /// Whether to ask the clock after each tick.
    Wait,
}
const PARAMETERS: usize = 8;
const PARAMETERS_BYTES: u64 = 4 * PARAMETERS as u64;

/// What the guest is, and what it does. Travels to the target, which makes the same machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Config {
    pub ram_bytes: u64,
    /// What the vCPUs write round and round, all together; 0 makes an idle guest.
    pub hot_bytes: u64,
    pub vcpus: u64,
    /// Bytes a second that the vCPUs dirty, all together; 0 for as fast as they can.
    pub dirty_rate: u64,
    /// What random bytes RAM holds at first; without it, zeros.
    pub seed: Option<u64>,
    /// Whether KVM is to keep a dirty ring for each vCPU.
    pub dirty_ring: bool,
}

/// Where a vCPU works.
struct Part {
    start: u64,
    hot_end: u64,
    end: u64,
}

impl Config {
    /// Says what is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if self.ram_bytes % MIB != 0 || !(RAM_MIN..=RAM_MAX).contains(&self.ram_bytes) {
            return Err("RAM has to be whole MiB, from 4 MiB to 1 TiB".to_owned());
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(format!("{} vCPUs are not possible; 1 to {VCPUS_MAX} are", self.vcpus));
        }
        let room = self.part_bytes() * self.vcpus - UNIT_BYTES * self.vcpus;
        if self.hot_bytes > room {
            return Err(format!("a hot set of {} bytes does not fit: there is room for {room}", self.hot_bytes));
        }
        Ok(())
    }

    /// The end of the RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.ram_bytes.min(LOW_MAX)
    }

    /// RAM as it lies in the guest's address space: start and length of each piece, each a memory slot of its own.
    pub fn ranges(&self) -> Vec<(GuestAddress, usize)> {
        let half = self.low_end() / 2 / MIB * MIB;
        let low = [(0, MIB), (MIB, half), (half, self.low_end())].map(|(start, end)| (start, end - start));
        let high = (FOUR_GIB, self.ram_bytes - self.low_end());
        let all = low.into_iter().chain([high]).filter(|(_, bytes)| *bytes > 0);
        all.map(|(start, bytes)| (GuestAddress(start), bytes as usize)).collect()
    }

    /// How many pages the device writes, round and round.
    pub fn device_pages(&self) -> u64 {
        (UNITS - DEVICE + self.ram_bytes - self.low_end()) / PAGE
    }

    /// The address of the device's page of this number: some of low RAM, then all RAM above 4 GiB.
    pub fn device_page(&self, number: u64) -> GuestAddress {
        let low = (UNITS - DEVICE) / PAGE;
        GuestAddress(if number < low { DEVICE + number * PAGE } else { FOUR_GIB + (number - low) * PAGE })
    }

    /// How many pages all vCPUs testify to.
    pub fn swept_pages(&self) -> u64 {
        (0..self.vcpus).map(|vcpu| self.part(vcpu)).map(|part| (part.end - part.start) / PAGE).sum()
    }

    /// The units that each vCPU writes before a tick, and the nanoseconds from tick to tick.
    fn pace(&self) -> (u64, u64) {
        const MS: u64 = 1_000_000;
        let units_max = if self.dirty_ring { UNITS_A_TICK_RING } else { UNITS_A_TICK };
        match (self.hot_bytes, self.dirty_rate) {
            (0, _) => (0, MS),
            (_, 0) => (units_max, 0),
            (_, rate) => {
                let a_ms = rate / 1000 / self.vcpus / UNIT_BYTES;
                let units = a_ms.clamp(1, units_max);
                (units, (u128::from(units * UNIT_BYTES * self.vcpus) * 1_000_000_000 / u128::from(rate)) as u64)
            }
        }
    }

    /// The time from tick to tick of a vCPU; zero for as short as it can be.
    pub fn tick_time(&self) -> Duration {
        Duration::from_nanos(self.pace().1)
    }

    fn part_bytes(&self) -> u64 {
        (self.low_end() - UNITS) / self.vcpus / UNIT_BYTES * UNIT_BYTES
    }

    fn part(&self, vcpu: u64) -> Part {
        let start = UNITS + vcpu * self.part_bytes();
        let end = if vcpu + 1 == self.vcpus { self.low_end() } else { start + self.part_bytes() };
        let hot = self.hot_bytes.div_ceil(self.vcpus * UNIT_BYTES) * UNIT_BYTES;
        Part { start, hot_end: start + hot, end }
    }

    fn parameters(&self, vcpu: u64) -> [u32; PARAMETERS] {
        let part = self.part(vcpu);
        let mut words = [0; PARAMETERS];
        let mut set = |parameter: Parameter, value: u64| words[parameter as usize] = value as u32;
        set(Parameter::HotStart, part.start);
        set(Parameter::HotEnd, part.hot_end);
        set(Parameter::HotUnits, self.pace().0);
        set(Parameter::ColdStart, part.hot_end);
        set(Parameter::ColdEnd, part.end);
        set(Parameter::ColdSweep, u64::from(self.hot_bytes > 0));
        set(Parameter::Wait, u64::from(!self.tick_time().is_zero()));
        words
    }

    /// Where a vCPU begins.
    pub fn entry(&self, vcpu: u64) -> Entry {
        let part = self.part(vcpu);
        Entry {
            ip: PROGRAM,
            stack: STACKS + (vcpu + 1) * PAGE,
            parameters: vcpu * PARAMETERS_BYTES,
            hot: part.start,
            cold: part.hot_end,
            mix: PASS_MIX.into(),
        }
    }

    /// What lies at address 0: all parameters, and the program. The guest never writes to it.
    pub fn image(&self) -> Vec<u8> {
        let words = (0..self.vcpus).flat_map(|vcpu| self.parameters(vcpu));
        let mut image: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        image.resize(PROGRAM as usize, 0);
        image.extend_from_slice(program());
        assert!(image.len() as u64 <= STACKS, "the program has outgrown its pages");
        image
    }

    /// Makes RAM what it is before the guest runs: random bytes where that is asked for, and in them what the sweeps
    /// and the device would have written in a pass before the first.
    pub fn fill(&self, memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
        let mut page = [0u8; PAGE as usize];
        for (start, bytes) in self.ranges() {
            for address in (start.0..start.0 + bytes as u64).step_by(PAGE as usize) {
                if let Some(seed) = self.seed {
                    scramble(&mut page, seed ^ address);
                }
                if (UNITS..FOUR_GIB).contains(&address) {
                    let word = (address as u32).to_le_bytes();
                    page[..4].copy_from_slice(&word);
                    page[PAGE as usize - 4..].copy_from_slice(&word);
                }
                memory.write_slice(&page, GuestAddress(address))?;
            }
        }
        memory.write_slice(&self.image(), GuestAddress(0))
    }
}

/// The registers that a vCPU begins with.
pub struct Entry {
    pub ip: u64,
    pub stack: u64,
    /// The base of fs.
    pub parameters: u64,
    pub hot: u64,
    pub cold: u64,
    pub mix: u64,
}

fn program() -> &'static [u8] {
    let start = &raw const minivmm_guest_start;
    let bytes = (&raw const minivmm_guest_end).addr() - start.addr();
    // SAFETY: guest.s puts the end behind the start in one section, which is read-only data.
    unsafe { std::slice::from_raw_parts(start, bytes) }
}

/// Bytes that do not repeat and do not compress: four xorshift generators side by side, for speed.
fn scramble(page: &mut [u8; PAGE as usize], seed: u64) {
    let mut lanes = [1, 2, 3, 4].map(|lane: u64| (seed ^ lane << 60).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        let lane = &mut lanes[index % 4];
        *lane ^= *lane << 13;
        *lane ^= *lane >> 7;
        *lane ^= *lane << 17;
        word.copy_from_slice(&lane.to_le_bytes());
    }
}
