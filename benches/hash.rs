//! Question: how fast are pages hashed, in cache and out of it, in every way this CPU can?
//!
//! Rivals, off the shelf: std's `DefaultHasher`; and `memcpy`, the price of looking at a page at all.
//! Limit: the hash must do 40 GB/s on a page in cache where there is AVX2, so that it hides behind the kernel's copy.
// Unsafe because the functions measured read through raw pointers; the buffers are the benchmark's own.
#![expect(unsafe_code)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pageferry::memory::hash::PageHash;
use std::hash::Hasher;
use std::hint::black_box;
use std::time::Duration;

const PAGE: usize = 4096;
/// Far more than the last-level cache.
const COLD_PAGES: usize = 512 << 20 >> 12;
/// Pages in one sample out of cache: 512 KiB, a run as the scanner cuts it.
const RUN_PAGES: usize = 128;

/// Pages of our own, every byte of them written, so that none is the kernel's shared page of zeros.
struct Pages {
    words: Vec<[u64; PAGE / 8]>,
    next: usize,
}

impl Pages {
    fn new(count: usize, fill: impl Fn(u64) -> u64) -> Pages {
        let mut words = vec![[1; PAGE / 8]; count];
        words.iter_mut().flatten().enumerate().for_each(|(i, word)| *word = fill(i as u64));
        Pages { words, next: 0 }
    }

    /// Calls `look` on the next run of pages, round and round.
    fn run(&mut self, mut look: impl FnMut(*const u8)) {
        let ptr = self.words.as_mut_ptr();
        for _ in 0..RUN_PAGES {
            // In bounds: `next` is below the number of pages.
            look(black_box(ptr.wrapping_add(self.next).cast()));
            self.next += 1;
            if self.next == self.words.len() {
                self.next = 0;
            }
        }
    }
}

fn noise(i: u64) -> u64 {
    (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

fn bytes<'a>(page: *const u8) -> &'a [u8] {
    // SAFETY: a page of `Pages`, which nobody writes to while a benchmark runs.
    unsafe { std::slice::from_raw_parts(page, PAGE) }
}

/// Makes the compiler believe that somebody wants the value.
fn consume<T>(value: T) {
    black_box(value);
}

fn measure(c: &mut Criterion, title: &str, pages: &mut Pages, ways: &mut [(&str, &mut dyn FnMut(*const u8))]) {
    let mut group = c.benchmark_group(title);
    group.throughput(Throughput::Bytes((RUN_PAGES * PAGE) as u64));
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    for (name, look) in ways {
        group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(|| pages.run(&mut *look)));
    }
    group.finish();
}

fn hash(c: &mut Criterion) {
    for (title, count) in [("hash, in cache", 4), ("hash, out of cache", COLD_PAGES)] {
        let mut pages = Pages::new(count, noise);
        for way in PageHash::available() {
            // SAFETY: `PAGE` bytes of `Pages`, aligned to words, reached through its `*mut`.
            let mut look = |page| consume(unsafe { way.hash(page, PAGE) });
            measure(c, title, &mut pages, &mut [(way.name(), &mut look)]);
        }
        let mut copy = vec![0; PAGE];
        let mut memcpy = |page| black_box(&mut copy[..]).copy_from_slice(bytes(page));
        let mut siphash = |page| {
            let mut hasher = std::hash::DefaultHasher::new();
            hasher.write(bytes(page));
            consume(hasher.finish());
        };
        measure(c, title, &mut pages, &mut [("rival: DefaultHasher", &mut siphash), ("memcpy", &mut memcpy)]);
    }
}

criterion_group!(benches, hash);
criterion_main!(benches);
