//! A target that answers heartbeats and never takes a data channel in does not hold the source for ever.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use pageferry::units::{Generation, InstanceId, PageSize};
use pageferry::wire::control::{FrameDecoder, FrameEncoder, SourceFrame, TargetFrame};
use pageferry::wire::hello::{HELLO_BYTES, Hello, HelloRole, Side};
use pageferry::{DirtyBitmap, Failure, Outcome, Source, Timeouts};

/// Heartbeats after which this target leaves, so that a source that waits for ever fails the test.
const PINGS_MAX: u64 = 20;

/// Says Ready, drops every data connection unheard, and answers each Ping.
fn take_no_channel(listener: &TcpListener) {
    let (mut control, _) = listener.accept().unwrap();
    let mut hello = [0; HELLO_BYTES];
    control.read_exact(&mut hello).unwrap();
    let theirs = Hello::decode(&hello).unwrap();
    let (role, side, generation) = (HelloRole::Control, Side::Target, Generation(1));
    let own = Hello { role, side, generation, session: theirs.session, features: 0 };
    control.write_all(&own.encode()).unwrap();
    let (mut decoder, mut encoder) = (FrameDecoder::<SourceFrame>::new(), FrameEncoder::<TargetFrame>::new());
    let mut answer = |control: &mut TcpStream, frame: TargetFrame| {
        let mut bytes = Vec::new();
        encoder.encode(&frame, &mut bytes).unwrap();
        control.write_all(&bytes).unwrap();
    };
    let mut buffer = [0; 4096];
    loop {
        let n = control.read(&mut buffer).unwrap();
        if n == 0 {
            return;
        }
        let mut input = &buffer[..n];
        while let Some(frame) = decoder.pull(&mut input).unwrap() {
            match frame {
                SourceFrame::Setup(_) => {
                    answer(&mut control, TargetFrame::Ready { instance: InstanceId([1; 16]), features: 0 });
                    drop(listener.accept().unwrap());
                }
                SourceFrame::Ping { nonce } if nonce < PINGS_MAX => {
                    answer(&mut control, TargetFrame::Pong { nonce, lanes: Vec::new() });
                }
                SourceFrame::Ping { .. } | SourceFrame::Error(_) => return,
                other => panic!("{other:?} was not expected"),
            }
        }
    }
}

#[test]
fn a_data_channel_that_is_dropped_before_it_joins_fails_the_migration_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let target = std::thread::spawn(move || take_no_channel(&listener));
    let ram = vmm::ram(PageSize::SIZE_4K, &[16]);
    let mut dirty = DirtyBitmap::for_ram(&ram);
    let mut guest = vmm::TestGuest::new(&ram, &dirty);
    let timeouts = Timeouts { hello: Duration::from_millis(500), ..Timeouts::default() };
    let source = Source::builder(ram).channels(1).timeouts(timeouts).connect(&to).unwrap();
    let report = source.migrate(&mut dirty, &mut guest);
    match report.outcome {
        Outcome::Failed(Failure::Channel { reason, .. }) => {
            assert!(reason.contains("before it had joined"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((guest.paused, guest.resumed), (0, 0));
    target.join().unwrap();
}
