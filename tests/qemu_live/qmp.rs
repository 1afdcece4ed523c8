//! QEMU's monitor: commands and their answers, events as they come.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long QEMU may take for anything: far more than it does, so that only what hangs is caught.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A connection to a monitor.
pub struct Qmp {
    lines: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// The beginning of a line whose rest was too late.
    begun: String,
}

impl Qmp {
    /// Takes its greeting, and says that commands follow.
    pub fn new(stream: UnixStream) -> Qmp {
        let mut qmp = Qmp { lines: BufReader::new(stream), events: VecDeque::new(), begun: String::new() };
        let greeting = qmp.line(Instant::now() + PATIENCE).expect("QEMU greets");
        assert!(greeting["QMP"].is_object(), "{greeting}");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    fn line(&mut self, until: Instant) -> Result<Value, String> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.lines.get_ref().set_read_timeout(Some(left)).unwrap();
        match self.lines.read_line(&mut self.begun) {
            Ok(0) => Err("QEMU has closed its monitor".to_owned()),
            Err(error) => Err(format!("nothing from QEMU's monitor: {error}")),
            Ok(_) => {
                let line = std::mem::take(&mut self.begun);
                Ok(serde_json::from_str(&line).unwrap_or_else(|error| panic!("not JSON ({error}): {line:?}")))
            }
        }
    }

    /// Sends a command and waits for its answer: what it returns, or its error's description.
    pub fn try_run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.try_run_within(command, arguments, PATIENCE)
    }

    pub fn try_run_within(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, String> {
        let words = json!({ "execute": command, "arguments": arguments });
        writeln!(self.lines.get_mut(), "{words}").map_err(|error| format!("{command}: {error}"))?;
        let until = Instant::now() + limit;
        loop {
            let mut line = self.line(until).map_err(|error| format!("{command}: {error}"))?;
            if line["event"].is_string() {
                self.events.push_back(line);
            } else if line["error"].is_object() {
                return Err(line["error"]["desc"].as_str().unwrap_or_default().to_owned());
            } else {
                return Ok(line["return"].take());
            }
        }
    }

    /// [`try_run`](Self::try_run) of what cannot fail.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.try_run(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Waits for an event that is wanted, and drops those before it.
    pub fn wait_for(&mut self, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value, String> {
        let until = Instant::now() + limit;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.line(until)?,
            };
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    /// Waits until the state of the migration is one of these.
    pub fn wait_for_migration(&mut self, states: &[&str]) -> String {
        let state = |event: &Value| match event["event"].as_str() {
            Some("MIGRATION") => event["data"]["status"].as_str().unwrap_or_default().to_owned(),
            _ => String::new(),
        };
        match self.wait_for(PATIENCE, |event| states.contains(&state(event).as_str())) {
            Ok(event) => state(&event),
            Err(error) => {
                let now = self.try_run_within("query-migrate", json!({}), Duration::from_secs(5));
                panic!("waited for a migration that is {states:?}: {error}; it is {now:?}")
            }
        }
    }

    /// Whether the guest runs.
    pub fn runs(&mut self) -> bool {
        self.run("query-status", json!({}))["running"].as_bool().unwrap()
    }
}
