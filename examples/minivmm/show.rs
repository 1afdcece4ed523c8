//! Shows on a terminal how far a migration is.
#![forbid(unsafe_code)]

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::options::human;
use crate::protocol::Line;

/// A line that is gone when this is dropped.
pub struct Bar {
    bar: ProgressBar,
    migration: u32,
}

impl Bar {
    /// Shows nothing where machines listen, or nobody looks.
    pub fn new(json: bool, migration: u32) -> Bar {
        let target = match json || !std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}% {wide_msg}") {
            bar.set_style(style);
        }
        Bar { bar, migration }
    }

    pub fn show(&mut self, line: &Line) {
        let first = line.rounds <= 1;
        let left = if first { line.ram_bytes - line.untouched_bytes.min(line.ram_bytes) } else { line.bytes_left };
        let done = if first { line.pushed_bytes } else { line.ram_bytes.saturating_sub(left) };
        self.bar.set_length(line.ram_bytes);
        self.bar.set_position(done.min(line.ram_bytes));
        let mut words = format!("migration {}, {}, round {}", self.migration, line.stage, line.rounds);
        if line.rate_bytes_s > 0 {
            words += &format!(", {}/s", human(line.rate_bytes_s));
        }
        if line.dirty_rate_bytes_s > 0 {
            words += &format!(", the guest dirties {}/s", human(line.dirty_rate_bytes_s));
        }
        if line.throttle > 0 {
            words += &format!(", held back by {} %", line.throttle);
        }
        self.bar.set_message(words);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
