//! The serial port of a guest that counts, and whether it counted without a break.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::qmp::PATIENCE;

/// What a guest counts in: what comes before the first number, and how a number looks, its line's end included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Numbers {
    /// Eight hexadecimal digits from the first byte on.
    Hexadecimal,
    /// Decimal, after a line that says so.
    Decimal,
}

const BEGIN: &[u8] = b"PAGEFERRY-COUNTS\n";

impl Numbers {
    fn print(self, number: u32) -> String {
        match self {
            Numbers::Hexadecimal => format!("{number:08x}\n"),
            Numbers::Decimal => format!("{number}\n"),
        }
    }

    /// How many whole numbers are there: 0, 1, 2 and so on, each once, and nothing else between them.
    pub fn count(self, bytes: &[u8]) -> Result<u32, String> {
        let mut rest = match self {
            Numbers::Hexadecimal => bytes,
            Numbers::Decimal => match bytes.windows(BEGIN.len()).position(|window| window == BEGIN) {
                Some(at) => &bytes[at + BEGIN.len()..],
                None => return Ok(0),
            },
        };
        for number in 0.. {
            let expected = self.print(number);
            let here = &rest[..expected.len().min(rest.len())];
            if !expected.as_bytes().starts_with(here) {
                let found = String::from_utf8_lossy(&rest[..rest.len().min(40)]).into_owned();
                return Err(format!("the guest is to print {number} and prints {found:?}"));
            }
            if here.len() < expected.len() {
                return Ok(number);
            }
            rest = &rest[expected.len()..];
        }
        unreachable!("a stream ends")
    }
}

#[derive(Default)]
struct Heard {
    bytes: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

/// What a guest prints, as it comes.
pub struct Serial {
    heard: Arc<Heard>,
    reader: Option<JoinHandle<()>>,
}

impl Serial {
    pub fn new(mut from: impl Read + Send + 'static) -> Serial {
        let heard = Arc::new(Heard::default());
        let tell = heard.clone();
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let read = from.read(&mut buffer).unwrap_or(0);
                let mut bytes = tell.bytes.lock().unwrap();
                bytes.0.extend(&buffer[..read]);
                bytes.1 = read == 0;
                tell.more.notify_all();
                if read == 0 {
                    return;
                }
            }
        });
        Serial { heard, reader: Some(reader) }
    }

    /// Bytes that have come so far.
    pub fn bytes(&self) -> usize {
        self.heard.bytes.lock().unwrap().0.len()
    }

    /// Waits until there are so many bytes more, of the guest's numbers or of anything, as long as some come now and then.
    pub fn wait_for_more(&self, more: usize) {
        let mut heard = self.heard.bytes.lock().unwrap();
        let (wanted, mut silent) = (heard.0.len() + more, false);
        while heard.0.len() < wanted && !silent {
            let before = heard.0.len();
            let nothing_new = |(bytes, ended): &mut (Vec<u8>, bool)| bytes.len() == before && !*ended;
            heard = self.heard.more.wait_timeout_while(heard, PATIENCE, nothing_new).unwrap().0;
            silent = heard.0.len() == before;
        }
        let end = String::from_utf8_lossy(&heard.0[heard.0.len().saturating_sub(200)..]).into_owned();
        drop(heard);
        assert!(!silent, "the guest is silent; it said last: {end:?}");
    }

    /// Waits until it has counted up to a number, on the machine where it began.
    pub fn wait_for_number(&self, numbers: Numbers, number: u32) {
        let until = Instant::now() + PATIENCE;
        while numbers.count(&self.so_far()).unwrap() < number {
            assert!(Instant::now() < until, "the guest counts too slowly");
            self.wait_for_more(4 * number as usize);
        }
    }

    pub fn so_far(&self) -> Vec<u8> {
        self.heard.bytes.lock().unwrap().0.clone()
    }

    /// All that it has printed, once QEMU has ended.
    pub fn whole(mut self) -> Vec<u8> {
        self.reader.take().expect("it is joined once").join().unwrap();
        self.so_far()
    }
}

#[test]
fn a_number_that_is_missing_or_comes_twice_or_late_is_a_break() {
    let count = |text: &str| Numbers::Hexadecimal.count(text.as_bytes());
    assert_eq!(count(""), Ok(0));
    assert_eq!(count("00000000\n00000001\n0000"), Ok(2));
    assert!(count("00000000\n00000002\n").is_err());
    assert!(count("00000000\n00000000\n").is_err());
    assert!(count("00000000\n000000\n00001\n").is_err());
    assert!(count("00000000\n!0020f000").unwrap_err().contains('!'));
    let count = |text: &str| Numbers::Decimal.count(text.as_bytes());
    assert_eq!(count("Linux says this\nPAGEFERRY-COUNTS\n0\n1\n2\n"), Ok(3));
    assert!(count("PAGEFERRY-COUNTS\n0\n1\nBAD\n").is_err());
}
