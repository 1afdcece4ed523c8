//! Stands between source and target, passes everything on, and cuts connections where it is told to.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// Gets a connection's number, in the order in which the source connects (0 is the control connection), and says after
/// how many bytes to the target it is cut.
pub type Plan = dyn Fn(usize) -> Option<u64> + Send + Sync;

/// The proxy. Its threads end with their connections; the one that accepts ends with the process.
pub struct Cutter {
    address: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
    trigger: Arc<Mutex<Trigger>>,
}

/// What happens after so many bytes more.
type Trigger = Option<(u64, Box<dyn Fn() + Send>)>;

impl Cutter {
    /// A proxy before the target at this address.
    pub fn before(target: &str, plan: Box<Plan>) -> Cutter {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let open = Arc::new(Mutex::new(Vec::new()));
        let trigger = Arc::new(Mutex::new(None));
        let (to, all, triggers) = (target.to_owned(), open.clone(), trigger.clone());
        std::thread::spawn(move || {
            for (number, near) in listener.incoming().enumerate() {
                let near = near.unwrap();
                let Ok(far) = TcpStream::connect(&to) else { continue };
                near.set_nodelay(true).unwrap();
                far.set_nodelay(true).unwrap();
                all.lock().unwrap().push(near.try_clone().unwrap());
                let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let (limit, passed) = (plan(number), triggers.clone());
                std::thread::spawn(move || pump(near, far, limit, |n| count(&passed, n)));
                std::thread::spawn(move || pump(back_from, back_to, None, |_| {}));
            }
        });
        Cutter { address, open, trigger }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Cuts so many of the data connections that are open now.
    pub fn data_scissors(&self) -> impl Fn(usize) + Send + 'static {
        let open = self.open.clone();
        move |count| {
            for connection in open.lock().unwrap().iter().skip(1).take(count) {
                let _ = connection.shutdown(Shutdown::Both);
            }
        }
    }

    /// Cuts the control connection.
    pub fn control_scissors(&self) -> impl Fn() + Send + 'static {
        let open = self.open.clone();
        move || {
            if let Some(connection) = open.lock().unwrap().first() {
                let _ = connection.shutdown(Shutdown::Both);
            }
        }
    }

    /// Calls this once, when so many bytes have passed to the target over all connections.
    pub fn cut_after(&self, bytes: u64, cut: impl Fn() + Send + 'static) {
        *self.trigger.lock().unwrap() = Some((bytes, Box::new(cut)));
    }

    /// Cuts everything that is open now.
    pub fn scissors(&self) -> impl Fn() + Send + 'static {
        let open = self.open.clone();
        move || {
            for connection in open.lock().unwrap().drain(..) {
                let _ = connection.shutdown(Shutdown::Both);
            }
        }
    }
}

fn count(trigger: &Mutex<Trigger>, n: u64) {
    let mut trigger = trigger.lock().unwrap();
    match &mut *trigger {
        Some((left, _)) if *left > n => *left -= n,
        Some((_, cut)) => {
            cut();
            *trigger = None;
        }
        None => {}
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, limit: Option<u64>, passed: impl Fn(u64)) {
    let mut buffer = vec![0; 1 << 16];
    let mut left = limit.unwrap_or(u64::MAX);
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let n = n.min(usize::try_from(left).unwrap_or(usize::MAX));
        left -= n as u64;
        passed(n as u64);
        if to.write_all(&buffer[..n]).is_err() || left == 0 {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
