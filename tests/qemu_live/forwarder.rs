//! Between a source and a destination: carries each connection, and counts what the source says on it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// What a main stream begins with.
const MAIN: &[u8; 4] = b"QEVM";

#[derive(Default)]
struct Bytes {
    main: AtomicU64,
    channels: AtomicU64,
    open: AtomicU64,
}

pub struct Forwarder {
    pub address: SocketAddr,
    bytes: Arc<Bytes>,
}

impl Forwarder {
    /// A listener that carries what comes to `target`. Its threads end with the connections or with the process.
    pub fn to(target: String) -> Forwarder {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let bytes = Arc::new(Bytes::default());
        let count = bytes.clone();
        thread::spawn(move || {
            for source in listener.incoming().map_while(Result::ok) {
                let Ok(onward) = TcpStream::connect(&target) else { return };
                let (back_from, back_to) = (onward.try_clone().unwrap(), source.try_clone().unwrap());
                count.open.fetch_add(1, Ordering::Relaxed);
                let count = count.clone();
                thread::spawn(move || {
                    carry(source, onward, &count);
                    count.open.fetch_sub(1, Ordering::Release);
                });
                thread::spawn(move || carry(back_from, back_to, &Bytes::default()));
            }
        });
        Forwarder { address, bytes }
    }

    /// Bytes of the main stream and of all channels, once every connection has been closed by the source.
    pub fn bytes(&self) -> (u64, u64) {
        while self.bytes.open.load(Ordering::Acquire) > 0 {
            thread::park_timeout(std::time::Duration::from_millis(1));
        }
        (self.bytes.main.load(Ordering::Relaxed), self.bytes.channels.load(Ordering::Relaxed))
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, bytes: &Bytes) {
    let mut buffer = vec![0; 1 << 18];
    let mut count = None;
    while let Ok(read) = from.read(&mut buffer) {
        if read == 0 || to.write_all(&buffer[..read]).is_err() {
            break;
        }
        // QEMU writes four bytes and more at once.
        let count = count.get_or_insert(if buffer.starts_with(MAIN) { &bytes.main } else { &bytes.channels });
        count.fetch_add(read as u64, Ordering::Relaxed);
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}
