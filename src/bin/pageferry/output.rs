//! Where words go: reports and events to standard output, complaints to standard error.

use std::ffi::CString;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use pageferry::sys::fault::{LastWords, on_bus_error};
use serde::Serialize;

use crate::report::{End, FAILED, Report};

/// How the program speaks. Nobody listening is no reason to stop: errors of writing are ignored.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// One JSON object a line if `json`, text for people otherwise.
    pub fn new(json: bool) -> Output {
        Output { json }
    }

    /// Whether it speaks JSON.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// An event, for machines only.
    pub fn event(self, event: &impl Serialize) {
        if self.json {
            if let Ok(line) = serde_json::to_string(event) {
                print_line(&line);
            }
        }
    }

    /// A line for people only.
    pub fn say(self, line: impl fmt::Display) {
        if !self.json {
            print_line(&line.to_string());
        }
    }

    /// The last word: the error if there is one, the report, and the exit code.
    pub fn end(self, report: &Report) -> ExitCode {
        if let Some(error) = &report.error {
            complain(error);
        }
        // Of an image that did not get across there is nothing else to say; of a guest that runs on there is.
        let tell = matches!(report.outcome, End::Completed | End::Uncertain) || report.demo.is_some();
        self.event(report);
        if tell {
            self.say(report.to_string().trim_end());
        } else {
            // Who was turned away may be who was waited for.
            report.remarks.iter().for_each(complain);
        }
        report.outcome.exit_code()
    }
}

/// What is said, and removed, should memory that maps a file turn out not to be had: a bus error, which nobody gets to
/// handle but a signal handler.
pub fn on_bus_error_fail(out: Output, command: &'static str, error: String, remove: Vec<CString>) {
    let stderr = format!("pageferry: {error}\n").into_bytes();
    let report = Report::early(command, End::Failed, Some(error));
    let line = serde_json::to_string(&report).ok().filter(|_| out.json);
    let stdout = line.map_or_else(Vec::new, |line| (line + "\n").into_bytes());
    let words = LastWords { stderr, stdout, remove, code: FAILED };
    if let Err(e) = on_bus_error(words) {
        complain(format_args!("warning: a full or failing disk would end the program without a word: {e}"));
    }
}

fn print_line(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// One sentence on standard error.
pub fn complain(what: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "pageferry: {what}");
}
