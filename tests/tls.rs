//! Migrations over TLS: they complete, nobody else gets in, and whoever is not let in is told why.
#![cfg(all(not(loom), feature = "tls"))]

#[path = "support/certs.rs"]
mod certs;
#[allow(dead_code)]
#[path = "failover/cutter.rs"]
mod cutter;
#[cfg(feature = "cli")]
#[path = "support/program.rs"]
mod program;
#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use certs::Ca;
use cutter::Cutter;
use pageferry::net::Tls;
use pageferry::units::{BlockId, PageSize};
use pageferry::{
    DirtyBitmap, Failure, Outcome, Ram, Source, SourceReport, Target, TargetReport, Verify, ZeroCopy, config::WhyCopied,
};
use vmm::{TestGuest, TestIncoming, Trip, assert_arrived};

const HERE: &str = "127.0.0.1";

fn guest(pages: u64) -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, &[pages]);
    vmm::fill(&ram, 1);
    (0..pages).step_by(5).for_each(|page| vmm::zero_page(&ram, BlockId(0), page));
    TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram))
}

fn small() -> Ram {
    vmm::ram(PageSize::SIZE_4K, &[16])
}

/// A source and a target that speak TLS, over loopback.
fn pair(guest: &TestGuest, source: Tls, target: Tls, channels: u8) -> (Source, Target) {
    let target = Target::builder().tls(target).listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let source = Source::builder(guest.ram.clone()).channels(channels).verify(Verify::Full).tls(source);
    (source.connect(&to).unwrap(), target)
}

fn travel(source: Source, guest: &mut TestGuest, target: Target) -> Trip {
    let mut dirty = guest.dirty.clone();
    vmm::travel(source, &mut dirty, guest, target, TestIncoming::new())
}

/// Says this to a target, and waits to be turned away.
fn say_and_wait(to: &str, bytes: &[u8]) {
    let mut stream = TcpStream::connect(to).unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

/// An attempt of which nothing may come: the target waits on, until it is told that nobody else will come.
fn attempt(source: Option<Tls>, target: Option<Tls>) -> (SourceReport, TargetReport) {
    let mut guest = guest(16);
    let listening = match target {
        Some(tls) => Target::builder().tls(tls),
        None => Target::builder(),
    };
    let target = listening.listen("127.0.0.1:0").unwrap();
    let (to, cancel) = (target.address().unwrap().to_string(), target.cancel_handle());
    let builder = Source::builder(guest.ram.clone()).channels(1);
    let source = match source {
        Some(tls) => builder.tls(tls),
        None => builder,
    };
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()));
    let mut dirty = guest.dirty.clone();
    let sent = source.connect(&to).unwrap().migrate(&mut dirty, &mut guest);
    // Whoever comes later is heard later: by now the target has heard all that the source had to say.
    say_and_wait(&to, &[]);
    cancel.cancel();
    assert_eq!((guest.paused, guest.resumed), (0, 0), "{sent:?}");
    (sent, receiving.join().unwrap())
}

/// Both sides say why, each for itself; the target in a remark, as a stranger's failure is not its own.
#[track_caller]
fn assert_refused(source: Option<Tls>, target: Option<Tls>, at_source: &[&str], at_target: &[&str]) {
    let (sent, received) = attempt(source, target);
    let (why, remarks) = (sent.outcome.to_string(), received.remarks.join("; "));
    assert!(matches!(sent.outcome, Outcome::Failed(_)), "{why}");
    assert_eq!(received.outcome, Outcome::Cancelled, "{remarks}");
    at_source.iter().for_each(|word| assert!(why.contains(word), "the source says {why:?}, not {word:?}"));
    at_target.iter().for_each(|word| assert!(remarks.contains(word), "the target says {remarks:?}, not {word:?}"));
}

#[test]
fn a_guest_that_writes_arrives_whole_over_one_channel_and_over_four() {
    let ca = Ca::new("ca");
    for channels in [1, 4] {
        let mut guest = guest(2000);
        let (source, target) = pair(&guest, ca.side(&["source"]), ca.side(&[HERE]), channels);
        let (ours, theirs) = (source.progress(), target.progress());
        guest.start(300);
        let trip = travel(source, &mut guest, target);
        assert_arrived(&guest, &trip);
        // What is on its way is the difference: a rest that never arrives would be waited for.
        for channel in 0..channels.into() {
            let counted = [&ours, &theirs].map(|progress| progress.channel(channel).unwrap().wire_bytes);
            assert_eq!(counted[0], counted[1], "channel {channel}");
        }
        let Trip { sent, received, .. } = &trip;
        assert!(sent.verified && received.verified);
        assert_eq!(sent.zero_copy.why_copied, vec![Some(WhyCopied::Encrypted); channels.into()]);
        assert!(sent.wire_bytes > sent.payload_bytes && received.wire_bytes > received.payload_bytes);
    }
}

#[test]
fn every_data_channel_goes_on_from_the_session_of_the_control_connection() {
    let ca = Ca::new("ca");
    for channels in [1, 4, 40] {
        let mut guest = guest(64);
        let (source, target) = pair(&guest, ca.side(&["source"]), ca.side(&[HERE]), channels);
        let trip = travel(source, &mut guest, target);
        assert_arrived(&guest, &trip);
        let tls = trip.sent.tls.unwrap();
        assert_eq!((tls.channels_resumed, tls.suite), (channels, "TLS13_AES_128_GCM_SHA256"));
    }
}

#[test]
fn without_tickets_that_fit_the_channels_shake_hands_in_full_and_the_migration_completes() {
    // More channels than the target gives tickets.
    let ca = Ca::new("ca");
    let mut guest = guest(64);
    let (source, target) = pair(&guest, ca.side(&["source"]), ca.side(&[HERE]), 140);
    let trip = travel(source, &mut guest, target);
    assert_arrived(&guest, &trip);
    let resumed = trip.sent.tls.unwrap().channels_resumed;
    assert!((100..140).contains(&resumed), "{resumed} of 140");
}

#[test]
fn channels_that_are_lost_come_back_encrypted_and_resume_the_session() {
    let ca = Ca::new("ca");
    let mut guest = guest(4000);
    let target = Target::builder().tls(ca.side(&[HERE])).listen("127.0.0.1:0").unwrap();
    // Two of four data connections are cut while pages are on their way.
    let plan = |number: usize| (1..=2).contains(&number).then_some(1_000_000);
    let cutter = Cutter::before(&target.address().unwrap().to_string(), Box::new(plan));
    let source = Source::builder(guest.ram.clone()).channels(4).verify(Verify::Full).tls(ca.side(&["source"]));
    let source = source.connect(cutter.address()).unwrap();
    guest.start(300);
    let trip = travel(source, &mut guest, target);
    assert_arrived(&guest, &trip);
    assert!(trip.sent.channels_lost >= 2, "{:?}", trip.sent);
    assert!(trip.sent.tls.unwrap().channels_resumed >= 4, "{:?}", trip.sent.tls);
}

#[test]
fn device_state_of_any_size_travels_encrypted() {
    let ca = Ca::new("ca");
    let mut guest = guest(16);
    guest.state = (0..9_000_000u32).map(|i| ((i * 31) >> 5) as u8).collect();
    let (source, target) = pair(&guest, ca.side(&["source"]), ca.side(&[HERE]), 1);
    let trip = travel(source, &mut guest, target);
    assert_arrived(&guest, &trip);
}

#[test]
fn unix_sockets_and_ready_made_ones_are_encrypted_under_a_name_that_is_given() {
    let ca = Ca::new("ca");
    for transport in [vmm::Transport::Unix, vmm::Transport::Fds] {
        let mut guest = guest(100);
        let source = Source::builder(guest.ram.clone()).tls(ca.side(&["source"]).name("vm.example").unwrap());
        let target = Target::builder().tls(ca.side(&["other.example", "vm.example"]));
        let (source, target) = transport.connect(source, target, 2);
        let trip = travel(source, &mut guest, target);
        assert_arrived(&guest, &trip);
        assert!(trip.sent.tls.is_some());
    }
    let nameless = Source::builder(small()).tls(ca.side(&["source"])).connect("unix:/run/nowhere");
    assert!(nameless.unwrap_err().to_string().contains("--tls-name"));
}

#[test]
fn an_expired_certificate_is_refused_and_called_that_on_both_sides() {
    let ca = Ca::new("ca");
    let old = |names: &[&str]| ca.tls(&ca.issue_as(names, |p| p.not_after = rcgen::date_time_ymd(2020, 1, 1)));
    assert_refused(
        Some(ca.side(&["source"])),
        Some(old(&[HERE])),
        &["the target's certificate expired", "days ago"],
        &["the source does not accept this side's certificate: it has expired"],
    );
    assert_refused(
        Some(old(&["source"])),
        Some(ca.side(&[HERE])),
        &["does not accept", "it has expired"],
        &["the source's certificate expired"],
    );
}

#[test]
fn a_certificate_that_is_not_valid_yet_is_refused_and_called_that() {
    let ca = Ca::new("ca");
    let new = ca.tls(&ca.issue_as(&[HERE], |p| p.not_before = rcgen::date_time_ymd(3000, 1, 1)));
    assert_refused(Some(ca.side(&["source"])), Some(new), &["the target's certificate is not valid for another"], &[]);
}

#[test]
fn a_certificate_of_an_unknown_ca_is_refused_on_either_side() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let stranger = |names: &[&str]| ca.tls(&other.issue(names));
    assert_refused(
        Some(ca.side(&["source"])),
        Some(stranger(&[HERE])),
        &["a CA that is unknown here"],
        &["unknown there"],
    );
    assert_refused(
        Some(stranger(&["source"])),
        Some(ca.side(&[HERE])),
        &["unknown there"],
        &["a CA that is unknown here"],
    );
}

#[test]
fn a_certificate_for_another_name_is_refused_with_both_names() {
    let ca = Ca::new("ca");
    let elsewhere = ca.side(&["a.example", "10.9.8.7"]);
    assert_refused(Some(ca.side(&["source"])), Some(elsewhere), &["is not for 127.0.0.1", "a.example, 10.9.8.7"], &[]);
    let named = ca.side(&["source"]).name("b.example").unwrap();
    assert_refused(Some(named), Some(ca.side(&[HERE])), &["is not for b.example", "127.0.0.1"], &[]);
}

#[test]
fn a_certificate_for_another_purpose_is_refused_with_the_purpose_it_lacks() {
    let ca = Ca::new("ca");
    let server_only = |p: &mut rcgen::CertificateParams| {
        p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    };
    let source = ca.tls(&ca.issue_as(&["source"], server_only));
    assert_refused(Some(source), Some(ca.side(&[HERE])), &["extended key usage"], &["lacks clientAuth"]);
}

#[test]
fn a_peer_without_tls_is_told_apart_on_both_sides() {
    let ca = Ca::new("ca");
    assert_refused(
        Some(ca.side(&["source"])),
        None,
        &["does not speak TLS; was --tls-dir given there?"],
        &["it speaks TLS, and this side does not; give --tls-dir here, too"],
    );
    assert_refused(
        None,
        Some(ca.side(&[HERE])),
        &["the peer speaks TLS, and this side does not; give --tls-dir here"],
        &["the source does not speak TLS; was --tls-dir given there?"],
    );
}

#[test]
fn a_server_of_another_protocol_is_no_tls_either() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mut guest = guest(16);
    let mut dirty = guest.dirty.clone();
    let source = Source::builder(guest.ram.clone()).tls(Ca::new("ca").side(&["source"])).connect(&to).unwrap();
    let sent = source.migrate(&mut dirty, &mut guest);
    server.join().unwrap();
    let Some(Failure::Tls { peer, reason }) = sent.outcome.failure() else { panic!("{}", sent.outcome) };
    assert_eq!((peer, reason.contains("does not speak TLS")), (&to, true), "{reason}");
}

#[test]
fn files_that_cannot_be_used_are_named_with_what_is_wrong() {
    let ca = Ca::new("ca");
    let own = ca.issue(&["source"]);
    let folder = std::env::temp_dir().join(format!("pageferry-tls-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let failure_with = |name: &str, text: Option<&str>| {
        ca.write(&own, &folder);
        let path = folder.join(name);
        match text {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let why = Tls::from_dir(&folder).unwrap_err().to_string();
        assert!(why.contains(&path.display().to_string()), "{why:?} does not name {path:?}");
        why
    };
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        assert!(failure_with(name, None).contains("No such file"));
    }
    assert!(failure_with("ca.pem", Some("")).contains("there is no certificate in it"));
    assert!(failure_with("cert.pem", Some(&own.key)).contains("there is no certificate in it"));
    assert!(
        failure_with("cert.pem", Some("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"))
            .contains("no PEM")
    );
    assert!(failure_with("key.pem", Some(&own.cert)).contains("there is no private key in it"));
    let other = ca.issue(&["other"]);
    let mismatch = failure_with("key.pem", Some(&other.key));
    assert!(
        mismatch.contains("this is not the key of the certificate in") && mismatch.contains("cert.pem"),
        "{mismatch}"
    );
    ca.write(&own, &folder);
    assert!(Tls::from_dir(&folder).is_ok());
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(ca.side(&["source"]).name("no name").is_err());
}

#[test]
fn zero_copy_that_is_insisted_on_cannot_be_had_under_tls() {
    let builder = Source::builder(small()).zero_copy(ZeroCopy::On).tls(Ca::new("ca").side(&["source"]));
    assert!(builder.connect("127.0.0.1:1").unwrap_err().to_string().contains("encrypted"));
}

/// The first bytes of a TLS handshake message of 60,000 bytes, and as much of it as anybody wants.
fn endless_handshake() -> Vec<u8> {
    let mut bytes = Vec::new();
    for first in [true, false, false, false] {
        bytes.extend([22, 3, 1, 0x3f, 0xff]);
        let mut body = vec![0; 0x3fff];
        if first {
            body[..4].copy_from_slice(&[1, 0, 0xea, 0x60]);
        }
        bytes.extend(body);
    }
    bytes
}

#[test]
fn strangers_during_a_migration_disturb_nobody() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let mut guest = guest(500);
    let (source, target) = pair(&guest, ca.side(&["source"]), ca.side(&[HERE]), 2);
    let to = target.address().unwrap().to_string();
    let wrong = other.side(&["source"]);
    guest.start(100);
    guest.on_pause = Some(Box::new(move || {
        let say = |bytes: &[u8]| say_and_wait(&to, bytes);
        say(&[0xff; 4096]);
        say(&[]);
        // A hello of TLS that is cut short, one that is nonsense, and one that has no end.
        say(&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]);
        say(&[&[22, 3, 1, 0, 64][..], &[1; 64]].concat());
        say(&endless_handshake());
        // Somebody with a certificate, of a CA that nobody here trusts.
        let stray = TestGuest::new(&small(), &DirtyBitmap::for_ram(&small()));
        let (mut dirty, mut stray) = (stray.dirty.clone(), stray);
        let source = Source::builder(stray.ram.clone()).tls(wrong.clone()).connect(&to).unwrap();
        assert!(matches!(source.migrate(&mut dirty, &mut stray).outcome, Outcome::Failed(_)));
    }));
    let trip = travel(source, &mut guest, target);
    assert_arrived(&guest, &trip);
    assert!(trip.received.turned_away >= 6, "{:?}", trip.received);
    let remarks = trip.received.remarks.join("; ");
    assert!(remarks.contains("does not speak TLS"), "{remarks}");
    assert!(remarks.contains("a message of TLS is longer than 32768 bytes"), "{remarks}");
}

/// The first thing that a source says.
fn first_words() -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let hearing = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 5];
        stream.read_exact(&mut head).unwrap();
        let mut rest = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
        stream.read_exact(&mut rest).unwrap();
        [&head[..], &rest].concat()
    });
    let mut guest = guest(16);
    let source = Source::builder(guest.ram.clone()).tls(Ca::new("ca").side(&["source"])).connect(&to).unwrap();
    let mut dirty = guest.dirty.clone();
    assert!(matches!(source.migrate(&mut dirty, &mut guest).outcome, Outcome::Failed(_)));
    hearing.join().unwrap()
}

#[test]
fn first_words_that_are_damaged_cut_or_repeated_in_any_way_end_nothing_but_their_connection() {
    const TRIES: u64 = 400;
    let good = first_words();
    let (ca, mut guest) = (Ca::new("ca"), guest(100));
    let (source, target) = pair(&guest, ca.side(&["source"]), ca.side(&[HERE]), 1);
    let to = target.address().unwrap().to_string();
    guest.on_pause = Some(Box::new(move || {
        for seed in 0..TRIES {
            let random = |what: u64, below: usize| (vmm::mix(seed * 8 + what) % below as u64) as usize;
            let mut bytes = good.clone();
            for change in 0..1 + random(0, 4) as u64 {
                // Mostly where lengths and types are.
                let at = if random(1, 3) == 0 { random(2 + change, good.len()) } else { random(2 + change, 50) };
                bytes[at] = vmm::mix(seed ^ (change << 32)) as u8;
            }
            match seed % 4 {
                0 => bytes.truncate(random(6, good.len())),
                1 => bytes.extend_from_slice(&good),
                2 => drop(bytes.splice(5..5, [22, 3, 1].into_iter().chain((good.len() as u16).to_be_bytes()))),
                _ => {}
            }
            say_and_wait(&to, &bytes);
        }
    }));
    let trip = travel(source, &mut guest, target);
    assert_arrived(&guest, &trip);
    assert_eq!(trip.received.turned_away, TRIES);
}

#[test]
fn a_cancel_ends_a_handshake_that_the_peer_leaves_hanging() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let mut guest = guest(16);
    let source = Source::builder(guest.ram.clone()).tls(Ca::new("ca").side(&["source"])).connect(&to).unwrap();
    let cancel = source.cancel_handle();
    let peer = std::thread::spawn(move || {
        // It hears the first word, so the handshake is under way, and says nothing.
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        let begun = Instant::now();
        cancel.cancel();
        let _ = stream.read_to_end(&mut Vec::new());
        begun.elapsed()
    });
    let mut dirty = guest.dirty.clone();
    let sent = source.migrate(&mut dirty, &mut guest);
    assert_eq!(sent.outcome, Outcome::Cancelled);
    let took = peer.join().unwrap();
    assert!(took < Duration::from_millis(500), "{took:?}");
}

#[test]
fn a_handshake_that_hangs_ends_at_the_time_limit_for_connecting() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let mut guest = guest(16);
    let timeouts = pageferry::Timeouts { connect: Duration::from_millis(100), ..pageferry::Timeouts::default() };
    let builder = Source::builder(guest.ram.clone()).timeouts(timeouts).tls(Ca::new("ca").side(&["source"]));
    let mut dirty = guest.dirty.clone();
    let sent = builder.connect(&to).unwrap().migrate(&mut dirty, &mut guest);
    assert!(sent.outcome.to_string().contains("did not finish the handshake in time"), "{}", sent.outcome);
    drop(listener);
}

/// A link that passes everything on, and changes one byte of what the source sends on its `connection`, counted from 0.
fn meddling_link(to: String, connections: usize, connection: usize, offset: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for index in 0..connections {
            let Ok((near, _)) = listener.accept() else { return };
            let far = TcpStream::connect(&to).unwrap();
            let (from, into) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            std::thread::spawn(move || pass(from, into, None));
            std::thread::spawn(move || pass(near, far, (index == connection).then_some(offset)));
        }
    });
    address
}

fn pass(mut from: TcpStream, mut into: TcpStream, meddle_at: Option<u64>) {
    let (mut bytes, mut at) = ([0; 4096], 0);
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        if let Some(offset) = meddle_at.filter(|offset| (at..at + n as u64).contains(offset)) {
            bytes[(offset - at) as usize] ^= 1;
        }
        at += n as u64;
        if into.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    let _ = (into.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
}

#[test]
fn a_byte_that_is_changed_on_its_way_is_found_wherever_it_is() {
    let ca = Ca::new("ca");
    // In the handshake, in a frame of control, in a page.
    for (connection, offset) in [(0, 100), (0, 4000), (1, 200_000)] {
        let mut guest = guest(500);
        let target = Target::builder().tls(ca.side(&[HERE])).listen("127.0.0.1:0").unwrap();
        let cancel = target.cancel_handle();
        let link = meddling_link(target.address().unwrap().to_string(), 2, connection, offset);
        let source = Source::builder(guest.ram.clone()).channels(1).verify(Verify::Off).tls(ca.side(&["source"]));
        guest.setup = vec![7; 8192];
        let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()));
        let mut dirty = guest.dirty.clone();
        let sent = source.connect(&link).unwrap().migrate(&mut dirty, &mut guest);
        cancel.cancel();
        let received = receiving.join().unwrap();
        assert!(matches!(sent.outcome, Outcome::Failed(_)), "{connection}, {offset}: {}", sent.outcome);
        assert!(!matches!(received.outcome, Outcome::Completed), "{connection}, {offset}");
        let told = format!("{} {} {:?}", sent.outcome, received.outcome, received.remarks);
        assert!(connection == 0 || told.contains("was changed on its way"), "{told}");
    }
}

/// The program, with certificates in folders.
#[cfg(feature = "cli")]
mod program_with_tls {
    use super::certs::Ca;
    use super::program::{Folder, run, start};

    /// A folder with what a side needs.
    fn side(folder: &Folder, name: &str, ca: &Ca, names: &[&str]) -> String {
        let path = folder.file(name);
        std::fs::create_dir(&path).unwrap();
        ca.write(&ca.issue(names), path.as_ref());
        path
    }

    fn image(folder: &Folder) -> (String, Vec<u8>) {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i >> 3) as u8).collect();
        std::fs::write(folder.file("from"), &bytes).unwrap();
        (folder.file("from"), bytes)
    }

    #[test]
    fn an_image_travels_to_an_open_address_without_a_warning() {
        let (folder, ca) = (Folder::new(), Ca::new("ca"));
        let (from, bytes) = image(&folder);
        let (here, there) = (side(&folder, "here", &ca, &["source"]), side(&folder, "there", &ca, &["vm.example"]));
        let to = folder.file("to");
        let mut receiver = start(&["receive", "--listen", "0.0.0.0:0", "--ram", &to, "--tls-dir", &there, "--json"]);
        let address = receiver.address().replace("0.0.0.0", "127.0.0.1");
        let options = ["--tls-dir", &here, "--tls-name", "vm.example", "--channels", "3", "--verify", "full"];
        let sent = run(&[&["send", "--to", &address, "--ram", &from], &options[..]].concat());
        let report = sent.expect(0, "completed");
        assert_eq!(
            (report["tls_suite"].as_str(), &report["tls_channels_resumed"]),
            (Some("TLS13_AES_128_GCM_SHA256"), &3.into())
        );
        let received = receiver.end();
        received.expect(0, "completed");
        assert_eq!((sent.stderr.as_str(), received.stderr.as_str()), ("", ""));
        assert!(std::fs::read(&to).unwrap() == bytes, "the image differs");
    }

    #[test]
    fn a_sender_is_told_what_is_wrong_before_anybody_is_disturbed() {
        let (folder, ca) = (Folder::new(), Ca::new("ca"));
        let (from, _) = image(&folder);
        let ended = run(&["send", "--to", "127.0.0.1:1", "--ram", &from, "--tls-dir", &folder.file("nowhere")]);
        assert!(ended.expect(1, "failed")["error"].as_str().unwrap().contains("nowhere/ca.pem"), "{ended:?}");
        let here = side(&folder, "here", &ca, &["source"]);
        let ended = run(&["send", "--to", "unix:/run/nowhere", "--ram", &from, "--tls-dir", &here]);
        assert!(ended.expect(1, "failed")["error"].as_str().unwrap().contains("--tls-name"), "{ended:?}");
    }

    #[test]
    fn a_sender_without_tls_is_warned_once_and_one_with_it_is_not() {
        let (folder, ca) = (Folder::new(), Ca::new("ca"));
        let (from, _) = image(&folder);
        let here = side(&folder, "here", &ca, &["source"]);
        // This is no address of the loopback, and it leads there: nobody listens.
        let send = ["send", "--to", "0.0.0.0:1", "--ram", &from];
        for (more, warnings) in [(&["--json"][..], 1), (&[], 1), (&["--json", "--tls-dir", &here], 0)] {
            let sender =
                std::process::Command::new(env!("CARGO_BIN_EXE_pageferry")).args(send).args(more).output().unwrap();
            let stderr = String::from_utf8(sender.stderr).unwrap();
            assert_eq!(stderr.matches("nothing is encrypted").count(), warnings, "{stderr}");
            assert_eq!(sender.status.code(), Some(1), "{stderr}");
        }
    }

    #[test]
    fn a_demo_travels_encrypted() {
        let (folder, ca) = (Folder::new(), Ca::new("ca"));
        let here = side(&folder, "here", &ca, &["127.0.0.1"]);
        let ended = run(&["demo", "--ram", "16M", "--dirty-rate", "10", "--tls-dir", &here]);
        assert_eq!(ended.expect(0, "completed")["tls_suite"], "TLS13_AES_128_GCM_SHA256");
        assert_eq!(ended.stderr, "");
    }
}
