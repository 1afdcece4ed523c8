use super::*;
use crate::qemu::wire::{MainEncoder, Name, NewRamPacket, ReturnDecoder, Subsection};
use crate::qemu::{Qemu, target::QemuReader};
use crate::framing::Framing;
use crate::framing::read::PacketReader;
use crate::units::InstanceId;
use crate::wire::control::Frame;

/// The last sections and the description of devices that there are none of.
const TAIL: &[u8] = b"\x04device\0\x06\0\0\0\x1f{\"page_size\":4096,\"devices\":[]}";
const BLOCKS: [(&str, u64); 2] = [("pc.ram", 4), ("pc.rom", 1)];

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn blocks() -> Vec<Block> {
    BLOCKS.map(|(text, pages)| Block::new(name(text), pages * PAGE_BYTES)).to_vec()
}

fn stream<'r>(records: impl IntoIterator<Item = Record<'r>>) -> Vec<u8> {
    let (mut encoder, mut bytes) = (MainEncoder::new(Dialect::V10_0), Vec::new());
    records.into_iter().for_each(|record| encoder.encode(&record, &mut bytes).unwrap());
    bytes
}

fn beginning(machine: &str, commands: &[Command]) -> Vec<Record<'static>> {
    let mut records = vec![Record::Header, Record::Machine(name(machine)), Record::Subsection(Subsection::Uuid([3; 16]))];
    records.extend(commands.iter().cloned().map(Record::Command));
    records.extend([Record::RamStart { section: 2 }, Record::Blocks(blocks())]);
    records
}

fn end_of_part(barrier: Barrier) -> Vec<Record<'static>> {
    match barrier {
        Barrier::PerRound => vec![Record::Flush, Record::EndOfSection, Record::Footer],
        Barrier::PerSection => vec![Record::EndOfSection, Record::Footer],
    }
}

fn with_return_path() -> [Command; 2] {
    [Command::OpenReturnPath, Command::Ping { value: 1 }]
}

/// A migration in two parts, the last of them with pages on this connection.
fn migration(barrier: Barrier, commands: &[Command], tail: &[u8]) -> Vec<u8> {
    let mut records = beginning("pc-q35-7.2", commands);
    records.extend(end_of_part(barrier));
    records.extend([Record::RamEnd, Record::ZeroPage { block: 0, offset: 0x1000 }]);
    records.extend(end_of_part(barrier));
    records.push(Record::Tail(tail));
    stream(records)
}

/// A dialogue, and what it has made of the bytes so far: in words, as frames are compared by what matters of them.
struct Play {
    dialogue: TargetDialogue,
    seen: Seen,
    heard: Vec<String>,
    finals: Vec<Final>,
    state: Vec<u8>,
    replies: Vec<u8>,
}

impl Play {
    /// Behind the magic.
    fn begin(channels: u8) -> Play {
        let seen = Seen::default();
        let dialogue = TargetDialogue::new(channels, seen.clone());
        Play { dialogue, seen, heard: Vec::new(), finals: Vec::new(), state: Vec::new(), replies: Vec::new() }
    }

    fn hear(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        loop {
            let heard = self.dialogue.hear(&mut bytes).map_err(|why| why.to_string());
            self.dialogue.reply(&mut self.replies);
            let Some(heard) = heard? else { return Ok(()) };
            let word = match heard {
                Heard::Frame(SourceFrame::Setup(setup)) => format!("setup of {}", setup.blocks.len()),
                Heard::Frame(SourceFrame::State { offset, bytes }) => {
                    assert_eq!(offset, self.state.len() as u64);
                    self.state.extend(bytes);
                    continue;
                }
                Heard::Frame(SourceFrame::Final(last)) => {
                    self.finals.push(last);
                    "final".to_owned()
                }
                Heard::Frame(frame) => frame.name().to_lowercase(),
                Heard::Page { block, offset, bytes } => format!("page {block} {offset:#x} {}", bytes.len()),
                Heard::Zero { block, page } => format!("zero {block} {page}"),
                Heard::Barrier(round) => {
                    // Every channel has sent its SYNC by then.
                    (0..self.dialogue.channels).for_each(|_| assert!(self.seen.begin_round()));
                    format!("barrier {round}")
                }
            };
            self.heard.push(word);
        }
    }

    /// Nothing more is here at present.
    fn quiet(&mut self) -> Result<(), String> {
        self.dialogue.quiet();
        self.hear(&[])
    }

    fn say(&mut self, frame: &TargetFrame) {
        self.dialogue.say(frame, &mut self.replies).unwrap();
    }

    fn messages(&self) -> Vec<ReturnMessage> {
        let (mut decoder, mut input) = (ReturnDecoder::new(), &self.replies[..]);
        std::iter::from_fn(|| decoder.pull(&mut input).unwrap()).collect()
    }

    /// Why a stream is refused, from behind the magic.
    fn refusal(channels: u8, stream: &[u8]) -> String {
        let mut play = Play::begin(channels);
        let why = play.hear(&stream[4..]).expect_err("it is taken");
        assert_eq!(play.hear(b"more").unwrap_err(), why, "from then on, always the same");
        why
    }
}

#[test]
fn a_stream_gives_its_frames_in_order_however_it_is_cut() {
    for (barrier, commands) in [(Barrier::PerRound, &with_return_path()[..]), (Barrier::PerSection, &[])] {
        let bytes = migration(barrier, commands, TAIL);
        for piece in [1, 7, bytes.len()] {
            let mut play = Play::begin(2);
            bytes[4..].chunks(piece).for_each(|piece| play.hear(piece).unwrap());
            let before = ["setup of 2", "barrier 0", "zero 0 1", "barrier 1"];
            assert_eq!(play.heard, before, "{barrier:?}, {piece} bytes at once");
            assert_eq!(play.dialogue.has_news(), !commands.is_empty());
            if commands.is_empty() {
                play.quiet().unwrap();
                assert_eq!(play.heard, before, "more may come, until the connection ends");
                assert_eq!(play.dialogue.ended(), Ok(true));
            } else {
                play.dialogue.quiet();
            }
            play.hear(&[]).unwrap();
            assert_eq!(play.heard[4..], ["final"]);
            let last = play.finals.remove(0);
            assert_eq!((last.round, last.lanes.len(), last.state_bytes), (Round(1), 2, TAIL.len() as u64));
            let mut crc = Crc32c::new();
            crc.update(TAIL);
            assert_eq!((play.state.as_slice(), last.state_crc), (TAIL, crc.finish()));
            assert_eq!(play.seen.counts().main_bytes, bytes.len() as u64);
        }
    }
}

#[test]
fn what_the_stream_says_of_its_guest_is_kept() {
    let mut play = Play::begin(2);
    let bytes = migration(Barrier::PerRound, &with_return_path(), TAIL);
    play.hear(&bytes[4..]).unwrap();
    let facts = play.seen.facts();
    assert_eq!(facts.machine, Some(name("pc-q35-7.2")));
    assert_eq!((facts.section, facts.barrier, facts.return_path), (2, Some(Barrier::PerRound), true));
    assert_eq!(facts.blocks, blocks());
    let configuration = stream(beginning("pc-q35-7.2", &[]).into_iter().take(3)).split_off(8);
    assert_eq!((configuration[0], facts.configuration), (7, configuration));
    assert_eq!((play.seen.counts().zero_pages, play.seen.counts().barriers), (1, 2));
}

#[test]
fn the_source_hears_that_all_is_well_once_the_guest_runs() {
    let mut play = Play::begin(2);
    play.hear(&migration(Barrier::PerRound, &with_return_path(), TAIL)[4..]).unwrap();
    play.quiet().unwrap();
    play.say(&TargetFrame::Loaded { round: Round(1) });
    assert!(play.dialogue.has_news());
    play.hear(&[]).unwrap();
    assert_eq!(play.heard.last().unwrap(), "final", "what has come meanwhile is read first");
    play.quiet().unwrap();
    assert_eq!(play.heard.last().unwrap(), "commit");
    let before = [ReturnMessage::Pong { value: 1 }, ReturnMessage::SwitchoverAck];
    assert_eq!(play.messages(), before);
    play.say(&TargetFrame::Running);
    assert_eq!(play.messages()[2..], [ReturnMessage::Shut { error: 0 }]);
}

#[test]
fn the_source_hears_once_that_it_has_failed_and_nothing_where_it_does_not_listen() {
    for commands in [&with_return_path()[..], &[]] {
        let mut play = Play::begin(2);
        play.hear(&migration(Barrier::PerRound, commands, TAIL)[4..]).unwrap();
        let answers = play.messages().len();
        play.say(&TargetFrame::Ready { instance: InstanceId([0; 16]), features: 0 });
        assert_eq!(play.messages().len(), answers);
        let reason = "no".to_owned();
        play.say(&TargetFrame::RunFailed { reason: reason.clone() });
        play.say(&TargetFrame::Discarded { reason });
        play.say(&TargetFrame::Running);
        let shut = ReturnMessage::Shut { error: 1 };
        assert_eq!(play.messages()[answers..], vec![shut; usize::from(!commands.is_empty())]);
    }
}

#[test]
fn bytes_behind_the_end_are_refused_whenever_they_come() {
    let bytes = migration(Barrier::PerRound, &with_return_path(), TAIL);
    for loaded in [false, true] {
        let mut play = Play::begin(2);
        play.hear(&bytes[4..]).unwrap();
        play.quiet().unwrap();
        if loaded {
            play.say(&TargetFrame::Loaded { round: Round(1) });
        }
        assert!(play.hear(b"\0").unwrap_err().contains("more bytes came behind the end"));
        play.quiet().unwrap_err();
        assert!(!play.heard.contains(&"commit".to_owned()));
    }
    // Where the end of the connection is the end, they are state of devices that is never described.
    let mut play = Play::begin(2);
    play.hear(&[&migration(Barrier::PerRound, &[], TAIL)[4..], b"\0"].concat()).unwrap();
    assert!(play.dialogue.ended().is_err());
}

#[test]
fn a_description_in_the_midst_of_the_state_is_no_end() {
    let twice = [TAIL, b"more", TAIL].concat();
    for commands in [&with_return_path()[..], &[]] {
        let bytes = migration(Barrier::PerRound, commands, &twice);
        let first = bytes.len() - twice.len() + TAIL.len();
        let mut play = Play::begin(2);
        play.hear(&bytes[4..first]).unwrap();
        assert_eq!(play.state, TAIL);
        // More comes before anybody has found nothing more.
        play.hear(&bytes[first..first + 1]).unwrap();
        play.quiet().unwrap();
        assert!(play.finals.is_empty() && !play.dialogue.has_news());
        play.hear(&bytes[first + 1..]).unwrap();
        play.quiet().unwrap();
        if commands.is_empty() {
            play.dialogue.ended().unwrap();
            play.hear(&[]).unwrap();
        }
        assert_eq!(play.finals.iter().map(|last| last.state_bytes).collect::<Vec<_>>(), [twice.len() as u64]);
    }
}

#[test]
fn a_stream_that_ends_anywhere_but_at_its_end_is_refused() {
    for commands in [&with_return_path()[..], &[]] {
        let bytes = migration(Barrier::PerSection, commands, TAIL);
        for end in 4..bytes.len() {
            let mut play = Play::begin(2);
            play.hear(&bytes[4..end]).unwrap();
            play.quiet().unwrap();
            assert!(play.dialogue.ended().is_err() && play.finals.is_empty(), "{end} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn a_page_of_the_same_block_as_the_last_is_of_that_also_in_the_next_section() {
    let page = [9; PAGE_BYTES as usize];
    let mut records = beginning("pc-q35-8.0", &[]);
    records.extend(end_of_part(Barrier::PerSection));
    records.extend([Record::RamPart, Record::ZeroPage { block: 1, offset: 0 }]);
    records.extend(end_of_part(Barrier::PerSection));
    records.extend([Record::RamPart, Record::ZeroPage { block: 0, offset: 0x2000 }]);
    records.extend(end_of_part(Barrier::PerSection));
    records.extend([Record::RamEnd, Record::Page { block: 0, offset: 0x3000 }, Record::PageData(&page)]);
    records.extend([Record::ZeroPage { block: 0, offset: 0 }]);
    let bytes = stream(records);
    assert_eq!(bytes.windows(7).filter(|bytes| bytes == b"\x06pc.ram").count(), 2, "in the list, and with its first page");
    let mut play = Play::begin(0);
    // The page comes in two pieces.
    let (first, rest) = bytes.split_at(bytes.len() - 1000);
    play.hear(&first[4..]).unwrap();
    play.hear(rest).unwrap();
    let marks = ["setup of 2", "barrier 0", "zero 1 0", "barrier 1", "zero 0 2", "barrier 2"];
    assert_eq!(play.heard[..6], marks);
    let left = 1000 - 9;
    let pages = [format!("page 0 0x3000 {}", 4096 - left), format!("page 0 {:#x} {left}", 0x4000 - left)];
    assert_eq!(play.heard[6..], [&pages[..], &["zero 0 0".to_owned()]].concat());
    assert_eq!((play.seen.counts().normal_pages, play.seen.counts().zero_pages), (1, 3));
}

#[test]
fn post_copy_and_its_like_are_refused_by_name() {
    let refused = [
        (Command::PostcopyListen, "POSTCOPY_LISTEN"),
        (Command::PostcopyRun, "POSTCOPY_RUN"),
        (Command::PostcopyRamDiscard(vec![1, 2, 3]), "POSTCOPY_RAM_DISCARD"),
        (Command::Packaged { bytes: 9 }, "PACKAGED"),
        (Command::PostcopyResume, "POSTCOPY_RESUME"),
        (Command::RecvBitmap(name("pc.ram")), "RECV_BITMAP"),
        (Command::EnableColo, "COLO"),
    ];
    for (command, word) in refused {
        let records = [Record::Header, Record::Machine(name("pc")), Record::Command(command)];
        let why = Play::refusal(2, &stream(records));
        assert!(why.contains(word), "{why}");
    }
    let mut play = Play::begin(2);
    let advised = [Command::PostcopyAdvise { page_sizes: None }];
    play.hear(&migration(Barrier::PerRound, &advised, TAIL)[4..]).unwrap();
}

#[test]
fn ram_that_ends_without_a_barrier_is_refused() {
    let mut records = beginning("pc-q35-10.0", &[]);
    records.extend(end_of_part(Barrier::PerRound));
    for page in [false, true] {
        let mut records = records.clone();
        records.push(Record::RamEnd);
        if page {
            records.extend([Record::Flush, Record::ZeroPage { block: 0, offset: 0 }]);
        }
        records.extend([Record::EndOfSection, Record::Footer]);
        let mut play = Play::begin(2);
        assert!(play.hear(&stream(records)[4..]).unwrap_err().contains("ends without a flush word"), "{page}");
    }
}

#[test]
fn barriers_of_channels_that_nobody_has_are_refused_at_the_first() {
    assert!(Play::refusal(0, &migration(Barrier::PerRound, &[], TAIL)).contains("on channels"));
}

#[test]
fn a_channel_that_is_ahead_when_ram_ends_is_refused() {
    let bytes = migration(Barrier::PerSection, &[], TAIL);
    let mut play = Play::begin(2);
    assert!(play.seen.begin_round());
    let why = play.hear(&bytes[4..]).unwrap_err();
    assert!(why.contains("behind the last SYNC"), "{why}");
    assert!(play.state.is_empty());
}

#[test]
fn only_a_source_that_knows_the_word_is_told_that_it_may_switch() {
    let acknowledged = |channels: u8, barrier, machine: &str, first: Option<Dialect>| {
        let mut play = Play::begin(channels);
        if let Some(dialect) = first {
            let sync = NewRamPacket::sync(0).encode(dialect).unwrap();
            let mut reader = QemuReader::new(&[], play.seen.clone());
            reader.packet(&sync, &[], &mut Vec::new()).unwrap();
        }
        let mut records = beginning(machine, &[Command::OpenReturnPath]);
        records.extend(end_of_part(barrier));
        play.hear(&stream(records)[4..]).unwrap();
        play.messages().contains(&ReturnMessage::SwitchoverAck)
    };
    assert!(acknowledged(2, Barrier::PerRound, "pc-q35-9.2", Some(Dialect::V10_0)));
    assert!(acknowledged(2, Barrier::PerSection, "pc-q35-7.2", Some(Dialect::V10_0)), "a new QEMU, an old machine");
    assert!(!acknowledged(2, Barrier::PerSection, "pc-q35-7.2", Some(Dialect::V7_2)));
    assert!(acknowledged(0, Barrier::PerSection, "pc-q35-10.0", None));
    assert!(acknowledged(0, Barrier::PerSection, "pc-i440fx-8.1", None));
    for old in ["pc-q35-8.0", "pc-q35-7.2", "microvm", "pc-q35-rhel9.2.0"] {
        assert!(!acknowledged(0, Barrier::PerSection, old, None), "{old}");
    }
}

#[test]
fn a_guest_is_complete_when_every_page_was_named() {
    let qemu = Qemu::new(2);
    let mut dialogue = TargetDialogue::new(2, qemu.seen());
    let bytes = migration(Barrier::PerRound, &[], TAIL);
    let Ok(Some(Heard::Frame(SourceFrame::Setup(setup)))) = dialogue.hear(&mut &bytes[4..]) else { panic!("no Setup") };
    assert_eq!(qemu.is_complete(&setup.blocks, &[4, 1]), Ok(()));
    let why = qemu.is_complete(&setup.blocks, &[4, 0]).unwrap_err();
    assert!(why.contains("pc.rom") && why.contains("0 of 1 pages"), "{why}");
    assert!(qemu.is_complete(&setup.blocks, &[3, 1]).is_err());
    assert_eq!(qemu.accept_missing(true).is_complete(&setup.blocks, &[0, 0]), Ok(()));
}
