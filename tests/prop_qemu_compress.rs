//! Pages through QEMU's compression and back: whatever they hold, and whatever somebody makes of the data on its way.
#![cfg(all(not(loom), feature = "qemu-compression"))]
#![forbid(unsafe_code)]

use std::io::Write;

use pageferry::qemu::compress::{Deflate, Inflate, PACKET_BYTES_MAX, PackFault};
use pageferry::qemu::wire::{COMPRESSED_BYTES_MAX, Compression};
use proptest::prelude::*;

const BOTH: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

/// Pages of which nobody can make less, from a number.
fn noise(pages: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes()
    };
    std::iter::repeat_with(word).take(pages * 512).flatten().collect()
}

/// The pages of one packet: of one value, of noise, or of both, as guests have them.
fn pages() -> impl Strategy<Value = Vec<u8>> {
    (1..=128_usize, any::<u64>(), 0..3).prop_map(|(pages, seed, kind)| match kind {
        0 => vec![seed as u8; pages * 4096],
        1 => noise(pages, seed),
        _ => noise(pages, seed).chunks(64).flat_map(|line| [&line[..8], &[0; 56]].concat()).collect(),
    })
}

/// What packets give that came one after the other.
fn inflate(method: Compression, packets: &[(Vec<u8>, usize)]) -> Result<Vec<Vec<u8>>, String> {
    let mut inflate = Inflate::new(method).unwrap();
    let read = |(data, bytes): &(Vec<u8>, usize)| {
        let mut pages = vec![0xa5; *bytes];
        inflate.packet(data, &mut pages).map(|()| pages).map_err(|error| error.to_string())
    };
    packets.iter().map(read).collect()
}

fn deflate(method: Compression, packets: &[Vec<u8>]) -> Vec<(Vec<u8>, usize)> {
    let mut deflate = Deflate::new(method).unwrap();
    packets.iter().map(|pages| (deflate.packet(pages).unwrap().to_vec(), pages.len())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn pages_survive_in_packets_of_every_size(packets in prop::collection::vec(pages(), 1..8)) {
        for method in BOTH {
            let sent = deflate(method, &packets);
            prop_assert!(sent.iter().all(|(data, _)| data.len() <= COMPRESSED_BYTES_MAX as usize));
            prop_assert_eq!(inflate(method, &sent).unwrap(), packets.clone());
        }
    }

    #[test]
    fn data_that_is_cut_gives_no_packet(pages in pages(), at in any::<prop::sample::Index>()) {
        for method in BOTH {
            let mut sent = deflate(method, std::slice::from_ref(&pages));
            let length = sent[0].0.len();
            // Of the flush the last byte may be one that says nothing: what is cut more has to be missed.
            sent[0].0.truncate(at.index(length));
            match inflate(method, &sent) {
                Ok(read) => prop_assert_eq!(&read[0], &pages),
                Err(error) => prop_assert!(error.contains("data of a packet"), "{}", error),
            }
        }
    }

    #[test]
    fn data_of_another_length_of_pages_is_refused(pages in pages(), more in any::<bool>()) {
        for method in BOTH {
            let mut sent = deflate(method, std::slice::from_ref(&pages));
            let bytes = if more { pages.len() + 4096 } else { pages.len().saturating_sub(4096) };
            if !(1..=PACKET_BYTES_MAX).contains(&bytes) {
                continue;
            }
            sent[0].1 = bytes;
            let error = inflate(method, &sent).unwrap_err();
            prop_assert!(error.contains(if more { "it gives " } else { "more bytes of pages" }), "{}", error);
        }
    }

    #[test]
    fn garbage_ends_a_channel_and_nothing_else(
        garbage in prop::collection::vec(any::<u8>(), 1..2000), flip in any::<prop::sample::Index>(), bit in 0..8
    ) {
        for method in BOTH {
            let mut inflate = Inflate::new(method).unwrap();
            let mut room = vec![0; 8192];
            let first = inflate.packet(&garbage, &mut room);
            // An error is final.
            if first.is_err() {
                let sound = deflate(method, &[vec![1; 4096]]);
                prop_assert_eq!(inflate.packet(&sound[0].0, &mut room[..4096]), first);
            }
            // One bit of a sound stream: an error or other pages, never a panic, never fewer pages.
            let mut sent = deflate(method, &[vec![1; 4096], noise(2, 7), vec![3; 8192]]);
            let at = flip.index(sent[1].0.len());
            sent[1].0[at] ^= 1_u8 << bit;
            let _ = inflate_or_say_why(method, &sent);
        }
    }
}

/// As [`inflate`], and looks at what an error says.
fn inflate_or_say_why(method: Compression, sent: &[(Vec<u8>, usize)]) -> Option<Vec<Vec<u8>>> {
    inflate(method, sent).map_err(|error| assert!(error.contains("byte "), "{error}")).ok()
}

#[test]
fn a_stream_that_ends_is_refused() {
    let pages = vec![7; 8192];
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(1));
    zlib.write_all(&pages).unwrap();
    let mut zstd = vec![0; 16384];
    let bytes = zstd_safe::compress(&mut zstd[..], &pages, 1).unwrap();
    zstd.truncate(bytes);
    for (method, data) in [(Compression::Zlib, zlib.finish().unwrap()), (Compression::Zstd, zstd)] {
        let error = Inflate::new(method).unwrap().packet(&data, &mut vec![0; 8192]).unwrap_err();
        assert_eq!(error.fault, PackFault::StreamEnd, "{error}");
    }
}

#[test]
fn a_frame_that_wants_more_memory_than_qemu_ever_does_is_refused() {
    // Magic, a descriptor without checksum and content size, and windows of 32 MiB, 64 MiB and 1 TiB, then a block of
    // four bytes repeated (RLE), not the last.
    for (window, allowed) in [(15 << 3, true), (16 << 3, false), (30 << 3, false)] {
        let block = (4096_u32 << 3 | 1 << 1).to_le_bytes();
        let data = [&[0x28, 0xb5, 0x2f, 0xfd, 0, window], &block[..3], &[9]].concat();
        let result = Inflate::new(Compression::Zstd).unwrap().packet(&data, &mut [0; 4096]);
        assert_eq!(result.is_ok(), allowed, "{result:?}");
    }
}

#[test]
fn little_data_cannot_give_more_than_its_pages() {
    // Half a mebibyte of zeros in a few kilobytes.
    for method in BOTH {
        let sent = deflate(method, &[vec![0; PACKET_BYTES_MAX]]);
        assert!(sent[0].0.len() < 8192);
        let error = Inflate::new(method).unwrap().packet(&sent[0].0, &mut [0; 4096]).unwrap_err();
        assert_eq!(error.fault, PackFault::TooMuch { expected: 4096 });
    }
}

#[test]
fn lengths_that_no_packet_has_are_refused() {
    for method in BOTH {
        for bytes in [0, 1, 4095, PACKET_BYTES_MAX + 4096] {
            let fault = PackFault::Pages { bytes };
            assert_eq!(Deflate::new(method).unwrap().packet(&vec![0; bytes]).unwrap_err().fault, fault);
            assert_eq!(Inflate::new(method).unwrap().packet(&[1], &mut vec![0; bytes]).unwrap_err().fault, fault);
        }
        for bytes in [0, COMPRESSED_BYTES_MAX as usize + 1] {
            let error = Inflate::new(method).unwrap().packet(&vec![0; bytes], &mut [0; 4096]).unwrap_err();
            assert!(matches!(error.fault, PackFault::Data { .. }), "{error}");
        }
    }
    assert!(Inflate::new(Compression::None).is_err() && Deflate::new(Compression::None).is_err());
}
