#![forbid(unsafe_code)]
//! Compares what has landed with what the source says it sent.

use crate::crew::Alarm;
use crate::memory::full;
use crate::session::target::Check;
use crate::target::driver::{Driver, Over};
use crate::target::lanes::Lanes;
use crate::units::{BlockId, Verify};
use crate::wire::control::Final;
use crate::wire::crc::Crc32c;

/// Chunk digests in one frame: as many as its body holds.
const CHUNKS_NAMED_MAX: usize = 65_536;

impl Driver<'_> {
    /// Compares with what the source says it sent. Everything has landed, and no lane is writing. `None` if the Final came
    /// to nothing meanwhile.
    pub fn check(&mut self, last: &Final) -> Result<Option<Check>, Over> {
        let check = self.check_sent(last);
        if check != Check::Agrees || self.verify != Verify::Full {
            return Ok(Some(check));
        }
        let Some(own) = self.full_digests()? else { return Ok(None) };
        if own.len() != last.full_digests.len() {
            return Ok(Some(Check::StateDiffers("Final has not one full digest a block".to_owned())));
        }
        Ok(Some(match own.iter().zip(&last.full_digests).position(|(own, sent)| own != sent) {
            Some(block) => Check::Differs { block: BlockId(block as u16), chunk_digests: Vec::new() },
            None => Check::Agrees,
        }))
    }

    /// Hashes all of RAM on other threads, and looks after the rest meanwhile. `None` if the Final came to nothing.
    fn full_digests(&mut self) -> Result<Option<Vec<u64>>, Over> {
        let Some(ram) = self.ram.clone() else { return Ok(None) };
        let (hashing, ringer) = (full::Hashing::default(), self.bell.ringer());
        std::thread::scope(|scope| {
            hashing.start(scope, &ram, self.id, self.channels.into(), move || Alarm::ring(&ringer));
            loop {
                if let Some(digests) = hashing.take() {
                    return Ok(Some(digests));
                }
                let served = self.service();
                if served.is_err() || !self.session.is_checking() || self.next_check.is_some() {
                    hashing.stop();
                    return served.map(|()| None);
                }
            }
        })
    }

    /// What was sent, against what has landed; and the device state.
    fn check_sent(&mut self, last: &Final) -> Check {
        self.rounds = last.round.0 + 1;
        let mut crc = Crc32c::new();
        self.state.iter().for_each(|piece| crc.update(piece));
        if crc.finish() != last.state_crc {
            return Check::StateDiffers("the device state is not what the source sent: its CRC differs".to_owned());
        }
        let Some(ram) = &self.ram else { return Check::StateDiffers("there is no memory".to_owned()) };
        let named: Vec<_> = self.lanes.iter().flat_map(Lanes::named).collect();
        if let Err(missing) = self.settings.framing.is_complete(&self.blocks, &named) {
            return Check::StateDiffers(missing);
        }
        if let Some(table) = &self.records.digests {
            if last.block_digests.len() != ram.blocks().len() {
                return Check::StateDiffers("Final has not one digest a block".to_owned());
            }
            for ((id, _), sent) in ram.iter().zip(&last.block_digests) {
                if table.block_digest(id) != *sent {
                    let digests = (0..table.chunks(id).min(CHUNKS_NAMED_MAX)).map(|c| table.chunk_digest(id, c));
                    return Check::Differs { block: id, chunk_digests: digests.collect() };
                }
            }
        }
        Check::Agrees
    }
}
