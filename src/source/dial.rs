#![forbid(unsafe_code)]
//! Connects off the control thread: a worker that resolves, connects, says Hello, and ends.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bell::{Bell, Close, Ringer};
use crate::config::CrewOptions;
use crate::crew::{Crew, Cx, Exit, Interrupt, Launch, Role, Starting};
use crate::error::Failure;
use crate::net::{Address, Endpoint, Opening, Stream, Tls, open};
use crate::poll::PollSleeper;

/// Where to, and how it is encrypted.
pub(super) struct Destination {
    pub addresses: Vec<Address>,
    pub tls: Option<Tls>,
}

/// A connection that is being made.
pub(super) struct Dial(Crew<DialRole>);

impl Dial {
    /// Starts to connect, and says this hello when there is a connection.
    pub fn start(
        number: usize,
        to: Destination,
        opening: Opening,
        hello: Vec<u8>,
        limit: Duration,
        options: &CrewOptions,
        controller: &Ringer<PollSleeper>,
    ) -> Result<Dial, Failure> {
        let bell = PollSleeper::bell().map_err(|e| Failure::Worker(format!("no eventfd to connect again: {e}")))?;
        let role = DialRole { bell, to, opening, hello, until: Instant::now() + limit };
        let options_of_thread = options.clone();
        let start = move |starting: &Starting<'_>| options_of_thread.own_hook(starting).map(|()| None);
        let launch =
            Launch { start: Arc::new(start), ..Launch::new(&*options.spawn, Arc::new(controller.clone())) };
        let made = crate::sys::thread::with_signals_blocked(|| {
            Crew::muster(number..number + 1, &launch, |_| Ok::<_, Infallible>(vec![role]))
        });
        made.map(Dial).map_err(|e| Failure::Worker(e.to_string()))
    }

    /// What became of it, once it has ended: the controller is rung then.
    pub fn poll(&mut self) -> Option<Result<Stream, Failure>> {
        let id = self.0.poll_exit()?;
        Some(match self.0.take_exit(id) {
            Some(Exit::Done(result)) => result,
            Some(Exit::Panicked { message }) => Err(Failure::Worker(format!("connecting again panicked: {message}"))),
            Some(Exit::NeverRan) | None => Err(Failure::Worker("no thread to connect again".to_owned())),
        })
    }
}

struct DialRole {
    bell: Bell<PollSleeper>,
    to: Destination,
    opening: Opening,
    hello: Vec<u8>,
    until: Instant,
}

/// Ends the wait for a connection.
struct HangUp(Ringer<PollSleeper>);

impl Interrupt for HangUp {
    fn interrupt(&self) {
        self.0.close(Close::Abort);
    }
}

impl Role for DialRole {
    const KIND: &'static str = "dial";
    type Output = Result<Stream, Failure>;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::new(HangUp(self.bell.ringer()))
    }

    fn run(mut self, _: &mut Cx) -> Result<Stream, Failure> {
        let ringer = self.bell.ringer();
        let mut endpoint = Endpoint::Addresses(self.to.addresses);
        let cancelled = || ringer.is_aborted();
        let opened = open(&mut endpoint, self.opening, self.to.tls.as_ref(), &mut self.bell, self.until, &cancelled)?;
        opened.ok_or(io::ErrorKind::Interrupted.into())
            .and_then(|mut stream| say_hello(&mut stream, &self.hello).map(|()| stream))
            .map_err(|e: io::Error| Failure::Connect { address: format!("{endpoint:?}"), reason: e.into() })
    }
}

/// Says Hello on a fresh connection, whose buffer takes so few bytes at once: no need to wait for room.
pub(super) fn say_hello(stream: &mut Stream, hello: &[u8]) -> io::Result<()> {
    match stream.send(hello)? {
        sent if sent == hello.len() && stream.unsent_bytes() == 0 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
