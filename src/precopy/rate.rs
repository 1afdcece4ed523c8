#![forbid(unsafe_code)]
//! How fast the link is: a mean that forgets.

use std::time::Duration;

/// The bytes the link carries per second: a mean that forgets, weighted by the bytes behind each sample.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Rate {
    bytes: f64,
    seconds: f64,
    /// A sample that is still too short to count.
    young: (f64, f64),
}

impl Rate {
    /// Samples older than about this many bytes no longer count.
    const MEMORY_BYTES: f64 = 256.0 * 1024.0 * 1024.0;
    /// A sample shorter than this says more about the scheduler, and about socket buffers, than about the link.
    const SAMPLE_SECONDS_MIN: f64 = 0.005;

    /// Adds what was shipped in a stretch of time in which the link was kept busy.
    pub fn add(&mut self, bytes: u64, time: Duration) {
        self.young.0 += bytes as f64;
        self.young.1 += time.as_secs_f64();
        let (bytes, seconds) = self.young;
        if seconds < Self::SAMPLE_SECONDS_MIN {
            return;
        }
        let keep = (1.0 - bytes / Self::MEMORY_BYTES).max(0.0);
        self.bytes = self.bytes * keep + bytes;
        self.seconds = self.seconds * keep + seconds;
        self.young = (0.0, 0.0);
    }

    /// Bytes per second; 0 while nothing is known. A short sample is better than none.
    pub fn bytes_per_second(&self) -> u64 {
        let (bytes, seconds) = if self.bytes > 0.0 { (self.bytes, self.seconds) } else { self.young };
        if seconds > 0.0 { (bytes / seconds) as u64 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_forgets_old_samples() {
        let mut rate = Rate::default();
        rate.add(1 << 30, Duration::from_secs(10));
        rate.add(1 << 30, Duration::from_secs(1));
        assert_eq!(rate.bytes_per_second(), 1 << 30);
        rate.add(1 << 30, Duration::from_micros(1));
        assert_eq!(rate.bytes_per_second(), 1 << 30, "too short a sample says nothing yet");
    }
}
