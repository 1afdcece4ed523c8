//! From the data of packets to their pages.

#![forbid(unsafe_code)]

use std::fmt;

use flate2::{Decompress, FlushDecompress, Status};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::{Compression, PackError, PackFault, ZSTD_WINDOW_BYTES_MAX, check_data, check_pages};

/// What a channel's compressed data is read with, from its first packet to its last.
///
/// An error is final: what comes after it cannot be read, so every later call returns it again.
///
/// ```
/// use pageferry::qemu::compress::{Deflate, Inflate};
/// use pageferry::qemu::wire::Compression;
///
/// let mut deflate = Deflate::new(Compression::Zstd)?;
/// let mut inflate = Inflate::new(Compression::Zstd)?;
/// for fill in [1, 2, 3] {
///     let (sent, mut received) = ([fill; 8192], [0; 8192]);
///     inflate.packet(deflate.packet(&sent)?, &mut received)?;
///     assert_eq!(received, sent);
/// }
/// # Ok::<(), pageferry::qemu::compress::PackError>(())
/// ```
pub struct Inflate {
    method: Compression,
    stream: Stream,
    failed: Option<PackError>,
}

enum Stream {
    Zlib(Decompress),
    Zstd(DCtx<'static>),
}

/// What one call of a decompressor did.
struct Step {
    taken: usize,
    given: usize,
    ended: bool,
}

impl Inflate {
    /// Before the first compressed packet of a channel.
    ///
    /// # Errors
    ///
    /// If there is no memory, or `method` is [`Compression::None`].
    pub fn new(method: Compression) -> Result<Inflate, PackError> {
        let unavailable = |reason| PackError { method, at: 0, fault: PackFault::Unavailable { reason } };
        let stream = match method {
            Compression::None => return Err(unavailable("pages that are not compressed need no decompressor")),
            Compression::Zlib => Stream::Zlib(Decompress::new(true)),
            Compression::Zstd => {
                let mut context = DCtx::try_create().ok_or(unavailable("there is no memory for zstd"))?;
                let limit = DParameter::WindowLogMax(ZSTD_WINDOW_BYTES_MAX.ilog2());
                context.set_parameter(limit).map_err(|_| unavailable("zstd takes no limit on its memory"))?;
                Stream::Zstd(context)
            }
        };
        Ok(Inflate { method, stream, failed: None })
    }

    /// How the channel is compressed.
    pub const fn method(&self) -> Compression {
        self.method
    }

    /// Fills `pages` with what `data`, the data of the channel's next packet, gives.
    ///
    /// # Errors
    ///
    /// If it gives anything but all of `pages`; `pages` may have been written to by then.
    pub fn packet(&mut self, data: &[u8], pages: &mut [u8]) -> Result<(), PackError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = check_data(self.method, data.len())
            .and_then(|()| check_pages(self.method, pages.len()))
            .and_then(|()| self.fill(data, pages));
        result.map_err(|error| self.failed.insert(error).clone())
    }

    fn fill(&mut self, data: &[u8], pages: &mut [u8]) -> Result<(), PackError> {
        let method = self.method;
        let (mut taken, mut given) = (0, 0);
        loop {
            // Where the pages are full, room for one byte more: what is left of the data must not fill it.
            let mut more = [0];
            let full = given == pages.len();
            let room = if full { &mut more[..] } else { &mut pages[given..] };
            let bad = |at, fault| PackError { method, at, fault };
            let step = self.stream.step(&data[taken..], room);
            let step = step.map_err(|reason| bad(taken, PackFault::Corrupt { reason }))?;
            taken += step.taken;
            if full && step.given > 0 {
                return Err(bad(taken, PackFault::TooMuch { expected: pages.len() }));
            }
            given += step.given;
            if step.ended {
                return Err(bad(taken, PackFault::StreamEnd));
            }
            // Only a call that does nothing proves that nothing is held back.
            if step.taken == 0 && step.given == 0 {
                return match taken < data.len() {
                    true => Err(bad(taken, PackFault::Corrupt { reason: "no byte more is taken".to_owned() })),
                    false if given < pages.len() => {
                        Err(bad(taken, PackFault::TooLittle { bytes: given, expected: pages.len() }))
                    }
                    false => Ok(()),
                };
            }
        }
    }
}

impl Stream {
    fn step(&mut self, data: &[u8], room: &mut [u8]) -> Result<Step, String> {
        match self {
            Stream::Zlib(stream) => {
                let before = (stream.total_in(), stream.total_out());
                let status = stream.decompress(data, room, FlushDecompress::Sync).map_err(|error| {
                    let dictionary = error.needs_dictionary().map(|_| "it wants a dictionary");
                    dictionary.or(error.message()).unwrap_or("it is damaged").to_owned()
                })?;
                let taken = (stream.total_in() - before.0) as usize; // No more than were given, and a usize counts those.
                let given = (stream.total_out() - before.1) as usize;
                Ok(Step { taken, given, ended: status == Status::StreamEnd })
            }
            Stream::Zstd(context) => {
                let (mut from, mut to) = (InBuffer::around(data), OutBuffer::around(room));
                let hint = context.decompress_stream(&mut to, &mut from);
                let hint = hint.map_err(|code| get_error_name(code).to_owned())?;
                // A hint of 0 says that a frame is over.
                Ok(Step { taken: from.pos(), given: to.pos(), ended: hint == 0 })
            }
        }
    }
}

impl fmt::Debug for Inflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inflate { method, failed, .. } = self;
        f.debug_struct("Inflate").field("method", method).field("failed", failed).finish_non_exhaustive()
    }
}
