//! Question: what do a packet's header, table and CRC cost beside the pages that travel with them?
//!
//! Rivals: a memcpy of the same bytes, the least that making them can cost; and the CPU's own CRC-32C instruction over
//! them, word after word, which stands beside our CRC.
//! Limit: for a packet of 1 MiB, to encode it and to decode and check it at most 0.5 % each of the 100 us that its pages
//! take at 10 GB/s, whether it has 1 run, 16, or one for every page.
// Unsafe because the CRC instruction is an intrinsic of the CPU that has it.
#![expect(unsafe_code)]

mod support;

use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

use pageferry::units::{BlockId, Epoch, PageSize, Round};
use pageferry::wire::crc::crc32c;
use pageferry::wire::packet::{
    HEADER_AND_TABLE_BYTES_MAX, PacketHeader, PacketKind, RunEntry, RunKind, check_crc, validate_table,
};
use support::{Options, Spread, Verdict, consume, cpus, interleave, run_undisturbed};

/// Pages of a packet: 1 MiB.
const PAGES: u32 = 256;
/// What they take at 10 GB/s, and how much of it is the limit.
const PAGES_NS: f64 = 100_000.0;
const LIMIT: f64 = 0.005;
/// Pages of the block that they are in.
const BLOCK_PAGES: u64 = 1 << 20;

/// So many runs, each as far from the next as it is long.
fn table(runs: u32) -> Vec<RunEntry> {
    let pages = PAGES / runs;
    (0..runs).map(|run| RunEntry { first: u64::from(2 * run * pages), pages, kind: RunKind::Data }).collect()
}

fn header(runs: u32) -> PacketHeader {
    PacketHeader {
        kind: PacketKind::Pages,
        block: BlockId(0),
        run_count: runs,
        round: Round(1),
        epoch: Epoch(2),
        sequence: 3,
        payload_bytes: u64::from(PAGES) * 4096,
    }
}

fn decode(bytes: &[u8]) {
    let (head, rest) = bytes.split_first_chunk().expect("a header");
    let header = PacketHeader::decode(head).expect("it is one of ours");
    let table = &rest[..header.table_bytes()];
    check_crc(head, table).expect("undamaged");
    consume(validate_table(&header, table, PageSize::SIZE_4K, BLOCK_PAGES).expect("it makes sense"));
}

/// CRC-32C by the instruction made for it; `None` where the CPU has none.
fn crc_by_instruction(bytes: &[u8]) -> Option<u32> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the CPU has it.
        return Some(unsafe { crc_sse42(bytes) });
    }
    let _ = bytes;
    None
}

/// # Safety
/// The CPU has SSE4.2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
unsafe fn crc_sse42(bytes: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u64};
    let words = bytes.chunks_exact(8);
    let rest = words.remainder();
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let crc = words.fold(u64::from(u32::MAX), |crc, bytes| _mm_crc32_u64(crc, word(bytes)));
    !rest.iter().fold(crc as u32, |crc, byte| _mm_crc32_u8(crc, *byte))
}

/// Nanoseconds of one of so many calls.
fn each(calls: u32, mut call: impl FnMut()) -> f64 {
    let begun = Instant::now();
    (0..calls).for_each(|_| call());
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
}

const NAMES: [&str; 5] = ["memcpy", "CRC, word after word", "our CRC", "encode", "decode and check"];

fn main() -> ExitCode {
    let options = Options::from_args();
    if let Some(cpu) = cpus().last() {
        core_affinity::set_for_current(*cpu);
        run_undisturbed();
    }
    let (turns, calls) = (options.pick(1, 21, 61), options.pick(10, 2000, 5000));
    let mut verdict = Verdict::default();
    for runs in [1, 16, PAGES] {
        let (header, table) = (header(runs), table(runs));
        let mut encoded = vec![0; HEADER_AND_TABLE_BYTES_MAX];
        let len = header.encode_into(&table, &mut encoded).expect("there is room");
        encoded.truncate(len);
        decode(&encoded);
        if let Some(crc) = crc_by_instruction(&encoded) {
            assert_eq!(crc, crc32c(&encoded), "the two ways disagree");
        } else {
            println!("SKIPPED packet: this CPU has no CRC-32C instruction that is known here");
        }
        let mut out = vec![0; HEADER_AND_TABLE_BYTES_MAX];
        let times = interleave(turns, NAMES.len(), |which| match which {
            0 => each(calls, || black_box(&mut out[..len]).copy_from_slice(black_box(&encoded))),
            1 => each(calls, || consume(crc_by_instruction(black_box(&encoded)))),
            2 => each(calls, || consume(crc32c(black_box(&encoded)))),
            3 => each(calls, || consume(header.encode_into(black_box(&table), black_box(&mut out)))),
            _ => each(calls, || decode(black_box(&encoded))),
        });
        println!("\n{runs} runs, {len} bytes of header and table, {turns} turns");
        for (which, name) in NAMES.iter().enumerate() {
            let spread = Spread::of(times[which].iter().copied());
            let share = spread.median / PAGES_NS;
            println!("  {name:<24}{:>28} ns   {:>6.3} % of 1 MiB", format!("{spread:.1}"), share * 100.0);
            if which >= 3 {
                verdict.limit(share <= LIMIT, || {
                    format!("{name}, {runs} runs: {:.2} %, at most {} % wanted", share * 100.0, LIMIT * 100.0)
                });
            }
        }
    }
    println!("\nLimit: at most {} % of the time of 1 MiB at 10 GB/s, each.", LIMIT * 100.0);
    verdict.finish(&options)
}
