#![forbid(unsafe_code)]
//! This library's own wire, version 1: a hello on each connection, control frames, packets.

use super::read::PacketReader;
use super::{Dialogue, Framing, Garbled, Heard, NativeReader, NativeWriter, PacketWriter};
use crate::memory::Ram;
use crate::units::ChannelId;
use crate::wire::control::{BlockInfo, Frame, FrameDecoder, FrameEncoder, SourceFrame, TargetFrame};
use crate::wire::hello::{HELLO_BYTES, HELLO_MAGIC, Hello};

/// Version 1 of this library's own wire ([`crate::wire`]).
#[derive(Clone, Copy, Default, Debug)]
pub struct Native;

impl Framing for Native {
    fn hello_bytes(&self, said: &[u8]) -> usize {
        // Whoever speaks another language is not waited for.
        let foreign = said.len() >= HELLO_MAGIC.len() && !said.starts_with(&HELLO_MAGIC);
        if foreign { said.len() } else { HELLO_BYTES }
    }

    fn who(&self, said: &[u8]) -> Result<Hello, String> {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..said.len()].copy_from_slice(said);
        Hello::decode(&bytes).map_err(|e| e.to_string())
    }

    fn hello(&self, hello: &Hello) -> Vec<u8> {
        hello.encode().to_vec()
    }

    fn answers_hello(&self) -> bool {
        true
    }

    fn channels(&self) -> Option<u8> {
        None
    }

    fn mends(&self) -> bool {
        true
    }

    fn at_source(&self) -> Box<dyn Dialogue<SourceFrame, TargetFrame>> {
        Box::new(NativeDialogue::new())
    }

    fn packets(&self, _: &Ram, _: ChannelId) -> Result<Box<dyn PacketWriter>, Garbled> {
        Ok(Box::new(NativeWriter::default()))
    }

    fn at_target(&self) -> Box<dyn Dialogue<TargetFrame, SourceFrame>> {
        Box::new(NativeDialogue::new())
    }

    fn reader(&self, blocks: &[BlockInfo], joins_late: bool) -> Box<dyn PacketReader> {
        Box::new(NativeReader::new(blocks, joins_late))
    }
}

/// Control frames, as they are.
#[derive(Debug)]
pub struct NativeDialogue<Out, In> {
    encoder: FrameEncoder<Out>,
    decoder: FrameDecoder<In>,
}

impl<Out: Frame, In: Frame> NativeDialogue<Out, In> {
    /// A new connection's.
    pub fn new() -> NativeDialogue<Out, In> {
        NativeDialogue { encoder: FrameEncoder::new(), decoder: FrameDecoder::new() }
    }
}

impl<Out: Frame, In: Frame> Default for NativeDialogue<Out, In> {
    fn default() -> NativeDialogue<Out, In> {
        NativeDialogue::new()
    }
}

impl<Out: Frame, In: Frame> Dialogue<Out, In> for NativeDialogue<Out, In> {
    fn say(&mut self, frame: &Out, out: &mut Vec<u8>) -> Result<(), Garbled> {
        Ok(self.encoder.encode(frame, out)?)
    }

    fn hear<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Heard<'i, In>>, Garbled> {
        Ok(self.decoder.pull(input)?.map(Heard::Frame))
    }

    fn ended(&mut self) -> Result<bool, Garbled> {
        Ok(self.decoder.finish().map(|()| false)?)
    }
}
