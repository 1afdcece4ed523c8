//! Sizes, rates and CPU lists, as people write and read them.

use std::time::Duration;

use pageferry::Failure;
use pageferry::config::parse_cpus;

/// Parses `4096`, `512M`, `1.5G` or `2GiB`; K, M, G and T are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size; write for example 512M, 2G or 1.5G (powers of 1024)");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(bad()),
    };
    // Whole numbers apart, so that none loses its last digits in a float.
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(bad);
    }
    let bytes = number.parse::<f64>().map_err(|_| bad())? * (1u64 << shift) as f64;
    if bytes.fract() == 0.0 && bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err(bad()) }
}

/// Parses `30`, `0.5` or `90s`: seconds.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.strip_suffix('s').unwrap_or(text).parse::<f64>().ok();
    let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.ok_or_else(|| format!("{text:?} is no time; write seconds, for example 30 or 0.5"))
}

/// The unit of [`parse_ram_size`]: the largest tracking page, so that a size is good on every host.
const RAM_UNIT: u64 = 64 << 10;

/// A size that a guest's RAM can have.
pub fn parse_ram_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes == 0 || bytes % RAM_UNIT != 0 {
        return Err(format!("{text:?} is {bytes} bytes; RAM has to be a multiple of 64K, and more than 0"));
    }
    Ok(bytes)
}

/// A list of CPUs. A type of its own: clap takes a `Vec` for an option that may be given several times.
#[derive(Clone, Debug, Default)]
pub struct Cpus(pub Vec<usize>);

impl std::str::FromStr for Cpus {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Cpus, Failure> {
        parse_cpus(text).map(Cpus)
    }
}

/// Milliseconds for machines.
pub fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Bytes for people: three digits that count, and a unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Bytes per second for people.
pub fn human_rate(bytes_per_second: u64) -> String {
    format!("{}/s", human(bytes_per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_with_or_without_fraction() {
        for (text, bytes) in
            [("1", 1), ("4096", 4096), ("64k", 65536), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1.5G", 3 << 29)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse_size("18446744073709551615"), Ok(u64::MAX));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "1X", "1.3", "1..5G", "99999999999T", "18446744073709551616", "0x10", "1e3"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for text in ["0", "4096", "65537"] {
            assert!(parse_ram_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_shown_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            (300 << 20, "300 MiB"),
            (2 << 30, "2.00 GiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
