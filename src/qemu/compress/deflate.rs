//! From pages to the data of packets.

#![forbid(unsafe_code)]

use std::fmt;

use flate2::{Compress, FlushCompress};
use zstd_safe::zstd_sys::ZSTD_EndDirective::ZSTD_e_flush;
use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, get_error_name};

use super::{COMPRESSED_BYTES_MAX, Compression, PackError, PackFault, check_pages};

/// QEMU's own default for both methods: the link is seldom slower than the next level.
const LEVEL: u32 = 1;

/// What a channel's pages are compressed with, from its first packet to its last.
///
/// The pages must lie still while they are read: a guest's are copied first. An error is final, as what the peer has read
/// does not go on then: every later call returns it again. Example: see [`super::Inflate`].
pub struct Deflate {
    method: Compression,
    stream: Stream,
    data: Box<[u8]>,
    failed: Option<PackError>,
}

enum Stream {
    Zlib(Compress),
    Zstd(CCtx<'static>),
}

impl Deflate {
    /// Before the first compressed packet of a channel.
    ///
    /// # Errors
    ///
    /// If there is no memory, or `method` is [`Compression::None`].
    pub fn new(method: Compression) -> Result<Deflate, PackError> {
        let unavailable = |reason| PackError { method, at: 0, fault: PackFault::Unavailable { reason } };
        let stream = match method {
            Compression::None => return Err(unavailable("pages that are not to be compressed need no compressor")),
            Compression::Zlib => Stream::Zlib(Compress::new(flate2::Compression::new(LEVEL), true)),
            Compression::Zstd => {
                let mut context = CCtx::try_create().ok_or(unavailable("there is no memory for zstd"))?;
                let level = CParameter::CompressionLevel(LEVEL as i32);
                context.set_parameter(level).map_err(|_| unavailable("zstd takes no level"))?;
                Stream::Zstd(context)
            }
        };
        let data = vec![0; COMPRESSED_BYTES_MAX as usize].into_boxed_slice();
        Ok(Deflate { method, stream, data, failed: None })
    }

    /// How the channel is compressed.
    pub const fn method(&self) -> Compression {
        self.method
    }

    /// The data of the channel's next packet, which has these pages: 1 to [`COMPRESSED_BYTES_MAX`] bytes, from which the
    /// peer gets all of them.
    ///
    /// # Errors
    ///
    /// If these are not the bytes of 1 to 128 pages, or the compressor fails, which is no fault of theirs.
    pub fn packet(&mut self, pages: &[u8]) -> Result<&[u8], PackError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match check_pages(self.method, pages.len()).and_then(|()| self.flushed(pages)) {
            Ok(bytes) => Ok(&self.data[..bytes]),
            Err(error) => Err(self.failed.insert(error).clone()),
        }
    }

    /// Compresses and flushes; how many bytes the data has.
    fn flushed(&mut self, pages: &[u8]) -> Result<usize, PackError> {
        let (mut taken, mut given) = (0, 0);
        loop {
            let bad = |reason: &str| {
                let fault = PackFault::Corrupt { reason: reason.to_owned() };
                PackError { method: self.method, at: given, fault }
            };
            let room = &mut self.data[given..];
            if room.is_empty() {
                return Err(bad("it is longer than the data of a packet may be"));
            }
            let (more_taken, more_given, flushed) = match &mut self.stream {
                Stream::Zlib(stream) => {
                    let before = (stream.total_in(), stream.total_out());
                    let room_bytes = room.len() as u64;
                    let result = stream.compress(&pages[taken..], room, FlushCompress::Sync);
                    result.map_err(|error| bad(error.message().unwrap_or("the compressor failed")))?;
                    let (taken, given) = (stream.total_in() - before.0, stream.total_out() - before.1);
                    // zlib: room that is left over says that nothing is held back.
                    (taken as usize, given as usize, given < room_bytes)
                }
                Stream::Zstd(context) => {
                    let (mut from, mut to) = (InBuffer::around(&pages[taken..]), OutBuffer::around(room));
                    let left = context.compress_stream2(&mut to, &mut from, ZSTD_e_flush);
                    let left = left.map_err(|code| bad(get_error_name(code)))?;
                    (from.pos(), to.pos(), left == 0)
                }
            };
            taken += more_taken;
            given += more_given;
            if flushed && taken == pages.len() {
                return Ok(given);
            }
        }
    }
}

impl fmt::Debug for Deflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Deflate { method, failed, .. } = self;
        f.debug_struct("Deflate").field("method", method).field("failed", failed).finish_non_exhaustive()
    }
}
