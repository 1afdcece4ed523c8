//! Where workers record the hashes of the pages that they move: for the comparison of both ends, and for whoever wants to
//! know what RAM holds.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::digest::{Contents, DigestTable, Notes, Recorder};
use crate::units::{BlockId, Round};

/// What is kept of each page that moves, if anything.
#[derive(Clone, Default, Debug)]
pub struct Records {
    /// Digests that both ends compare.
    pub digests: Option<Arc<DigestTable>>,
    /// Hashes that the VMM asked for.
    pub contents: Option<Arc<Contents>>,
}

impl Records {
    /// Whether pages need to be hashed.
    pub fn want_hashes(&self) -> bool {
        self.digests.is_some() || self.contents.is_some()
    }

    /// Begins to record pages of one block and one round.
    #[inline]
    pub fn of(&self, block: BlockId, round: Round) -> Recording<'_> {
        Recording {
            digests: self.digests.as_ref().map(|table| table.recorder(block, round)),
            contents: self.contents.as_ref().map(|contents| contents.notes(block, round)),
        }
    }
}

/// Records pages of one block and one round.
#[derive(Debug)]
pub struct Recording<'a> {
    digests: Option<Recorder<'a>>,
    contents: Option<Notes<'a>>,
}

impl Recording<'_> {
    /// A page that moves as data.
    #[inline]
    pub fn data(&mut self, page: u64, hash: u64) {
        if let Some(digests) = &mut self.digests {
            digests.page(page, hash);
        }
        if let Some(contents) = &mut self.contents {
            contents.data(page, hash);
        }
    }

    /// Pages of zeros.
    #[inline]
    pub fn zeros(&mut self, first: u64, pages: u32) {
        if let Some(digests) = &mut self.digests {
            digests.zero(first, pages);
        }
        if let Some(contents) = &mut self.contents {
            (first..first + u64::from(pages)).for_each(|page| contents.zero(page));
        }
    }
}
