//! A source without multifd, made of the encoder: one machine with one RAM block, and as much of its migration as is wanted.

#[path = "../support/qemu_tail.rs"]
mod qemu_tail;

use std::io::{Read, Write};
use std::net::TcpStream;

use pageferry::qemu::wire::{
    Block, Command, Dialect, MainEncoder, Name, Record, ReturnDecoder, ReturnMessage, Subsection,
};

use crate::program::Folder;
use crate::stores;
pub use qemu_tail::DEVICES;
use qemu_tail::tail;

pub const PAGE: usize = 4096;
pub const PAGES: u64 = 1024;

/// The bytes of a page: every fourth is zeros.
pub fn page(number: u64) -> Vec<u8> {
    let byte = if number % 4 == 0 { 0 } else { number as u8 | 1 };
    vec![byte; PAGE]
}

/// A store of this machine.
pub fn stored(folder: &Folder) -> String {
    let store = folder.file("store");
    let (receiver, address) = stores::receive(&store, "0", &[]);
    let mut source = Source::new(TcpStream::connect(address).unwrap());
    source.migrate();
    assert_eq!(source.answer(), Some(ReturnMessage::Shut { error: 0 }));
    drop(source);
    let ended = receiver.end();
    let report = ended.expect(0, "completed");
    assert_eq!(report["source_told"], true, "{report}");
    store
}

pub struct Source<S = TcpStream> {
    pub stream: S,
    encoder: MainEncoder,
    answers: ReturnDecoder,
}

impl<S: Read + Write> Source<S> {
    pub fn new(stream: S) -> Source<S> {
        Source { stream, encoder: MainEncoder::new(Dialect::V10_0), answers: ReturnDecoder::new() }
    }

    /// A receiver that has seen enough may be gone.
    pub fn say(&mut self, record: &Record<'_>) {
        let mut bytes = Vec::new();
        self.encoder.encode(record, &mut bytes).expect("a sound record");
        let _ = self.stream.write_all(&bytes);
    }

    /// Everything before the RAM, with a return path.
    pub fn head(&mut self, subsections: &[Subsection]) {
        self.say(&Record::Header);
        self.say(&Record::Machine(Name::new("pc-q35-10.0").unwrap()));
        subsections.iter().for_each(|subsection| self.say(&Record::Subsection(subsection.clone())));
        self.say(&Record::Command(Command::OpenReturnPath));
        self.say(&Record::Command(Command::Ping { value: 1 }));
    }

    fn end_section(&mut self) {
        self.say(&Record::EndOfSection);
        self.say(&Record::Footer);
    }

    /// The list of blocks, and half of the pages.
    pub fn begin(&mut self) {
        self.head(&[]);
        // Whoever leaves with something unread makes the system say so to the other end.
        assert_eq!(self.hear(|_| true), Some(ReturnMessage::Pong { value: 1 }));
        self.say(&Record::RamStart { section: 1 });
        self.say(&Record::Blocks(vec![Block::new(Name::new("pc.ram").unwrap(), PAGES * PAGE as u64)]));
        self.end_section();
        assert_eq!(self.hear(|_| true), Some(ReturnMessage::SwitchoverAck));
        self.say(&Record::RamPart);
        self.pages(0..PAGES / 2);
        self.end_section();
    }

    /// All of it, up to the last byte before the answer.
    pub fn migrate(&mut self) {
        self.migrate_with(DEVICES);
    }

    /// The same, with this description of the devices.
    pub fn migrate_with(&mut self, devices: &str) {
        self.begin();
        self.say(&Record::RamEnd);
        self.pages(PAGES / 2..PAGES);
        self.end_section();
        self.say(&Record::Tail(&tail(&[], devices)));
    }

    fn pages(&mut self, numbers: std::ops::Range<u64>) {
        for number in numbers {
            let (offset, bytes) = (number * PAGE as u64, page(number));
            // Not all zeros come as such.
            if bytes[0] == 0 && number % 8 == 0 {
                self.say(&Record::ZeroPage { block: 0, offset });
            } else {
                self.say(&Record::Page { block: 0, offset });
                self.say(&Record::PageData(&bytes));
            }
        }
    }

    /// The receiver's last word, if there is one before it leaves.
    pub fn answer(&mut self) -> Option<ReturnMessage> {
        self.hear(|message| matches!(message, ReturnMessage::Shut { .. }))
    }

    fn hear(&mut self, wanted: impl Fn(&ReturnMessage) -> bool) -> Option<ReturnMessage> {
        let mut buffer = [0; 256];
        while let Ok(n @ 1..) = self.stream.read(&mut buffer) {
            let mut input = &buffer[..n];
            while let Some(message) = self.answers.pull(&mut input).expect("a sound answer") {
                if wanted(&message) {
                    return Some(message);
                }
            }
        }
        None
    }
}
