//! What a capture means: the RAM that it makes, told by the plainest receiver there can be.

use std::collections::{BTreeMap, BTreeSet};

use pageferry::qemu::compress::Inflate;
use pageferry::qemu::wire::{ChannelDecoder, ChannelEvent, Command, Compression, Dialect, MainDecoder, Record};

use crate::capture::{CHANNELS, PAGE};

/// More than any of these migrations has.
const RAM_BYTES_MAX: usize = 1 << 26;

/// A page that a round writes: its block's name, its offset, and its bytes unless they are zeros.
struct Written(String, u64, Option<Vec<u8>>);

/// What must be in a store.
pub struct Meaning {
    pub blocks: BTreeMap<String, Vec<u8>>,
    /// Pages that one round writes twice, and not the same: their order is nobody's to know.
    pub torn: BTreeSet<(String, u64)>,
    /// The state of the devices, as long as it may be: a stream that stays open behind it may end at any description.
    pub tails: Vec<Vec<u8>>,
}

/// A channel's rounds; each ends with a SYNC. The numbers of its packets are appended to `numbers`.
fn channel(stream: &[u8], dialect: Dialect, numbers: &mut Vec<u64>) -> Result<(u8, Vec<Vec<Written>>), String> {
    let (mut decoder, mut input) = (ChannelDecoder::new(dialect), stream);
    let (mut id, mut rounds, mut round) = (None, Vec::new(), Vec::new());
    // How its pages are compressed, from the first of them on.
    let mut method: Option<(Compression, Option<Inflate>)> = None;
    loop {
        let (sync, pages, bytes) = match decoder.pull(&mut input).map_err(|error| error.to_string())? {
            None => break,
            Some(ChannelEvent::Init(init)) => {
                id = Some(init.channel);
                continue;
            }
            Some(ChannelEvent::Ram(packet)) => {
                if !packet.normal.is_empty() {
                    let way = packet.compression;
                    let begun = method.get_or_insert_with(|| (way, Inflate::new(way).ok()));
                    if begun.0 != way {
                        return Err("another way of compression".to_owned());
                    }
                }
                numbers.push(packet.number);
                let block = packet.block.unwrap_or_default().to_owned();
                let zero = packet.zero.iter().map(|offset| Written(block.clone(), offset, None));
                round.extend(zero);
                (
                    packet.sync,
                    packet.normal.iter().map(|offset| (block.clone(), offset)).collect::<Vec<_>>(),
                    packet.data_bytes,
                )
            }
            Some(_) => return Err("device state".to_owned()),
        };
        let data = input.get(..bytes as usize).ok_or("a packet is cut short")?;
        let mut pages_data = data.to_vec();
        if let Some((_, Some(inflate))) = method.as_mut().filter(|_| !pages.is_empty()) {
            pages_data = vec![0; pages.len() * PAGE];
            inflate.packet(data, &mut pages_data).map_err(|error| error.to_string())?;
        }
        round.extend(
            pages.into_iter().zip(pages_data.chunks(PAGE)).map(|((b, o), data)| Written(b, o, Some(data.to_vec()))),
        );
        decoder.data_taken(bytes.into());
        input = &input[bytes as usize..];
        if sync {
            rounds.push(std::mem::take(&mut round));
        }
    }
    decoder.finish().map_err(|error| error.to_string())?;
    if !round.is_empty() {
        return Err("pages behind the last SYNC".to_owned());
    }
    Ok((id.ok_or("no channel")?, rounds))
}

/// Whether the packets have the numbers that QEMU gives them, or those of somebody who numbers in another way.
fn are_numbered_through(channels: &[Vec<u64>]) -> bool {
    let firsts = channels.iter().filter_map(|numbers| numbers.first());
    let firsts = firsts.fold(0, |sum: u64, first| sum.wrapping_add(*first));
    let mut all = channels.concat();
    all.sort_unstable();
    let rise = channels.iter().all(|numbers| numbers.is_sorted_by(|one, next| one < next));
    let ours = firsts == (0..channels.len() as u64).sum::<u64>() && all.last().is_some_and(|last| *last > 0);
    !ours || (rise && (0..all.len() as u64).eq(all))
}

/// What the streams mean, or what is wrong with them.
pub fn meaning(streams: &[Vec<u8>], dialect: Dialect) -> Result<Meaning, String> {
    let mut ids = BTreeSet::new();
    let (mut channels, mut numbers) = (Vec::new(), Vec::new());
    for stream in &streams[1..] {
        let mut own = Vec::new();
        let (id, rounds) = channel(stream, dialect, &mut own)?;
        numbers.push(own);
        if id >= CHANNELS || !ids.insert(id) {
            return Err(format!("channel {id}"));
        }
        channels.push(rounds);
    }
    if dialect == Dialect::V10_0 && !are_numbered_through(&numbers) {
        return Err("packets are missing, or came twice".to_owned());
    }
    let (mut decoder, mut input) = (MainDecoder::new(dialect), &streams[0][..]);
    let mut rounds: Vec<Vec<Written>> = vec![Vec::new()];
    let mut names: Vec<(String, usize)> = Vec::new();
    let (mut started, mut flushes, mut open, mut tail) = (false, false, false, Vec::new());
    let (mut page, mut tails) = (None::<(usize, u64, Vec<u8>)>, Vec::new());
    while let Some(record) = decoder.pull(&mut input).map_err(|error| error.to_string())? {
        match record {
            Record::Blocks(list) => {
                names = list.iter().map(|block| (block.name.as_str().to_owned(), block.bytes as usize)).collect();
            }
            Record::Command(Command::OpenReturnPath) => open = true,
            Record::ZeroPage { block, offset } => {
                rounds.last_mut().unwrap().push(Written(names[block].0.clone(), offset, None));
            }
            Record::Page { block, offset } => page = Some((block, offset, Vec::new())),
            Record::PageData(bytes) => {
                let (block, offset, mut data) = page.take().expect("a page before its bytes");
                data.extend(bytes);
                if data.len() == PAGE {
                    rounds.last_mut().unwrap().push(Written(names[block].0.clone(), offset, Some(data)));
                } else {
                    page = Some((block, offset, data));
                }
            }
            Record::Flush => {
                flushes |= !started;
                rounds.push(Vec::new());
            }
            Record::EndOfSection => {
                if !flushes {
                    rounds.push(Vec::new());
                }
                started = true;
            }
            Record::Tail(bytes) => tail.extend(bytes),
            Record::TailWhole => {
                // A receiver may know better than the first of them, or have said so and be gone.
                if !open {
                    tails.clear();
                }
                tails.push(tail.clone());
            }
            _ => {}
        }
    }
    if !open {
        decoder.finish().map_err(|error| error.to_string())?;
    }
    if tails.is_empty() {
        return Err("the main stream is cut short".to_owned());
    }
    if rounds.pop().is_some_and(|round| !round.is_empty()) {
        return Err("pages of the main stream behind the last barrier".to_owned());
    }
    if let Some(channel) = channels.iter().find(|channel| channel.len() != rounds.len()) {
        return Err(format!("{} SYNCs for {} barriers", channel.len(), rounds.len()));
    }
    if names.iter().any(|(_, bytes)| *bytes > RAM_BYTES_MAX) {
        return Err("no such amount of RAM".to_owned());
    }
    let mut blocks: BTreeMap<_, _> = names.into_iter().map(|(name, bytes)| (name, vec![0; bytes])).collect();
    let mut torn = BTreeSet::new();
    for (index, main) in rounds.into_iter().enumerate() {
        let mut seen: BTreeMap<(String, u64), Option<Vec<u8>>> = BTreeMap::new();
        let of_channels = channels.iter_mut().flat_map(|rounds| std::mem::take(&mut rounds[index]));
        for Written(block, offset, data) in main.into_iter().chain(of_channels) {
            let ram = blocks.get_mut(&block).ok_or_else(|| format!("no block {block}"))?;
            let at = offset as usize;
            let here = ram.get_mut(at..at.saturating_add(PAGE)).ok_or("a page outside its block")?;
            match &data {
                Some(data) => here.copy_from_slice(data),
                None => here.fill(0),
            }
            let place = (block, offset);
            match seen.get(&place) {
                Some(before) if *before != data => drop(torn.insert(place)),
                // A later round that writes it once says what it holds.
                Some(_) => {}
                None => {
                    torn.remove(&place);
                    seen.insert(place, data);
                }
            }
        }
    }
    Ok(Meaning { blocks, torn, tails })
}
