//! The program across two network namespaces that lose packets, and whose links go down: it completes with every byte,
//! or both sides say in time that it did not, nothing is left at the target, and a second attempt completes.
#![cfg(all(not(loom), feature = "cli"))]
#![forbid(unsafe_code)]

#[path = "netns/network.rs"]
mod network;
#[path = "support/program.rs"]
mod program;
#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use network::Network;
use program::{Ended, Folder, Program, number};

const CHANNELS: &str = "3";
const IMAGE_BYTES: usize = 48 << 20;
/// Slow enough that a network can change while the image travels: it takes some 2 s.
const BYTES_A_SECOND: &str = "24M";
/// The program's longest time limit is 10 s; and a machine may be busy.
const TO_NOTICE: Duration = Duration::from_secs(60);

/// The network, or the reason for a skip.
fn network(test: &str, links: u32) -> Option<Network> {
    match Network::lacks() {
        None => Some(Network::new(links)),
        Some(why) => {
            support::skip(test, &why);
            None
        }
    }
}

/// An image in which every sixteenth page is a hole.
fn image(folder: &Folder) -> Vec<u8> {
    let mut bytes = vec![0u8; IMAGE_BYTES];
    for (number, page) in bytes.chunks_mut(4096).enumerate().filter(|(number, _)| number % 16 != 7) {
        let mut word = number as u64 + 1;
        for place in page.chunks_mut(8) {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
    fs::write(folder.file("from.img"), &bytes).unwrap();
    bytes
}

/// A migration under way: pages travel.
struct Journey {
    sender: Receiver<Ended>,
    receiver: Receiver<Ended>,
}

/// `options` are for both sides.
fn begin(network: &Network, folder: &Folder, to: &[&str], options: &[&str]) -> Journey {
    let arriving = folder.file("to.img");
    let mut receiver =
        network.at_target(&[&["receive", "--listen", "0.0.0.0:0", "--ram", &arriving, "--json"], options].concat());
    let address = receiver.address();
    let port = address.rsplit_once(':').unwrap().1;
    let to: Vec<_> = to.iter().flat_map(|host| ["--to".to_owned(), format!("{host}:{port}")]).collect();
    let to = to.iter().map(String::as_str).collect::<Vec<_>>();
    let image = folder.file("from.img");
    let rate = ["--channels", CHANNELS, "--bandwidth-max", BYTES_A_SECOND];
    let image = ["send", "--ram", &image, "--verify", "full", "--json"];
    let mut sender = network.at_source(&[&image[..], &rate, &to, options].concat());
    sender.wait_for_pages();
    Journey { sender: ending(sender), receiver: ending(receiver) }
}

/// What will be left of it, when it has ended.
fn ending(program: Program) -> Receiver<Ended> {
    let (tell, told) = channel();
    thread::spawn(move || tell.send(program.end()));
    told
}

/// Whether the sender has ended within this time.
fn is_over(journey: &Journey, after: Duration) -> Option<Ended> {
    match journey.sender.recv_timeout(after) {
        Ok(ended) => Some(ended),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => panic!("whoever waits for the sender has panicked"),
    }
}

/// Both sides say that it completed, and every byte is there.
#[track_caller]
fn assert_arrived(sent: &Ended, journey: &Journey, folder: &Folder, image: &[u8]) {
    let report = sent.expect(0, "completed");
    assert_eq!(report["verified"], true);
    let received = journey.receiver.recv_timeout(TO_NOTICE).unwrap();
    received.expect(0, "completed");
    assert!(fs::read(folder.file("to.img")).unwrap() == image, "the image differs");
    println!("{} ms, {} bytes on the wire", report["total_ms"], number(report, "wire_bytes"));
}

const MS_200: Duration = Duration::from_millis(200);

#[test]
fn packets_that_are_lost_in_bursts_cost_time_and_no_byte() {
    let Some(network) = network("packets_that_are_lost_in_bursts_cost_time_and_no_byte", 1) else { return };
    let folder = Folder::new();
    let image = image(&folder);
    let journey = begin(&network, &folder, &["10.77.0.2"], &[]);
    let mut lost = 0;
    let sent = loop {
        network.lose(30);
        let over = is_over(&journey, MS_200);
        lost += network.lose_none();
        if let Some(ended) = over.or_else(|| is_over(&journey, 2 * MS_200)) {
            break ended;
        }
    };
    assert_arrived(&sent, &journey, &folder, &image);
    assert!(lost > 20, "only {lost} packets were lost");
    println!("{lost} packets were lost");
}

#[test]
fn a_network_that_is_dead_for_a_while_costs_that_while() {
    let Some(network) = network("a_network_that_is_dead_for_a_while_costs_that_while", 1) else { return };
    let folder = Folder::new();
    let image = image(&folder);
    let journey = begin(&network, &folder, &["10.77.0.2"], &[]);
    network.lose(100);
    assert!(is_over(&journey, 6 * MS_200).is_none(), "it ended while nothing passed");
    let lost = network.lose_none();
    assert!(is_over(&journey, MS_200).is_none(), "it ended when hardly anything had passed");
    network.plug(0, false);
    assert!(is_over(&journey, 4 * MS_200).is_none(), "it ended while its link was down");
    network.plug(0, true);
    let sent = is_over(&journey, TO_NOTICE).expect("it is not over");
    assert_arrived(&sent, &journey, &folder, &image);
    assert!(lost > 0, "no packet was lost");
}

#[test]
fn a_network_that_stays_dead_ends_both_sides_in_time_and_a_second_attempt_completes() {
    let test = "a_network_that_stays_dead_ends_both_sides_in_time_and_a_second_attempt_completes";
    let Some(network) = network(test, 1) else { return };
    let folder = Folder::new();
    let image = image(&folder);
    let journey = begin(&network, &folder, &["10.77.0.2"], &[]);
    network.lose(100);
    let begun = Instant::now();
    let sent = is_over(&journey, TO_NOTICE).expect("the sender does not notice");
    let report = sent.expect(1, "failed");
    let received = journey.receiver.recv_timeout(TO_NOTICE).expect("the receiver does not notice");
    println!("after {:?}: {} and {}", begun.elapsed(), report["error"], received.report()["error"]);
    received.expect(1, "failed");
    assert_eq!(folder.names(), ["from.img"], "something is left at the target");
    network.lose_none();
    let journey = begin(&network, &folder, &["10.77.0.2"], &[]);
    let sent = is_over(&journey, TO_NOTICE).expect("it is not over");
    assert_arrived(&sent, &journey, &folder, &image);
}

#[test]
fn one_of_two_links_goes_down_and_costs_its_channels_and_no_byte() {
    let Some(network) = network("one_of_two_links_goes_down_and_costs_its_channels_and_no_byte", 2) else { return };
    let folder = Folder::new();
    let image = image(&folder);
    let journey = begin(&network, &folder, &["10.77.0.2", "10.77.1.2"], &[]);
    // Data channels take turns over the addresses; the control connection goes over the first.
    network.plug(1, false);
    let sent = is_over(&journey, TO_NOTICE).expect("it is not over");
    assert_arrived(&sent, &journey, &folder, &image);
    assert!(number(sent.report(), "channels_lost") >= 1, "{}", sent.report());
}

#[test]
fn a_network_that_is_dead_for_too_long_is_waited_for_within_the_resume_window() {
    let test = "a_network_that_is_dead_for_too_long_is_waited_for_within_the_resume_window";
    let Some(network) = network(test, 1) else { return };
    let folder = Folder::new();
    let image = image(&folder);
    let journey = begin(&network, &folder, &["10.77.0.2"], &["--resume-window", "60"]);
    network.lose(100);
    // Longer than any time limit that ends a connection.
    assert!(is_over(&journey, Duration::from_secs(14)).is_none(), "it ended within its window");
    network.lose_none();
    let sent = is_over(&journey, TO_NOTICE).expect("it is not over");
    assert_arrived(&sent, &journey, &folder, &image);
    println!("{}", sent.report());
}
