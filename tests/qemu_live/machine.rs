//! A QEMU process: what it is started with, its monitor, its RAM and its serial port.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::guest::Guest;
use crate::qmp::{PATIENCE, Qmp};
use crate::serial::Serial;

/// A QEMU that this machine may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    V7_2,
    V10_0,
}

impl Version {
    fn words(self) -> &'static str {
        match self {
            Version::V7_2 => "QEMU emulator version 7.2.",
            Version::V10_0 => "QEMU emulator version 10.0.",
        }
    }

    /// Its program: this system's, or the one in a folder that `tests/qemu_live/trixie` makes.
    pub fn program(self) -> Option<&'static Path> {
        static FOUND: [OnceLock<Option<PathBuf>>; 2] = [OnceLock::new(), OnceLock::new()];
        let found = FOUND[self as usize].get_or_init(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
            let named = ["PAGEFERRY_QEMU"].map(|name| std::env::var_os(name).map(PathBuf::from));
            let kept = cache.map(|cache| cache.join("pageferry/trixie/qemu"));
            let places = named.into_iter().flatten().chain(kept).chain([PathBuf::from("qemu-system-x86_64")]);
            places.into_iter().find(|program| {
                let said = Command::new(program).arg("--version").stdin(Stdio::null()).output();
                said.is_ok_and(|said| said.stdout.starts_with(self.words().as_bytes()))
            })
        });
        found.as_deref()
    }
}

/// What a machine is made of; source and destination are made of the same.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Setup {
    pub version: Version,
    pub machine: &'static str,
    pub ram_mib: u64,
    pub vcpus: u8,
    pub devices: &'static [&'static str],
    pub guest: Guest,
}

/// Video RAM, rings in guest RAM, a controller: what has state and blocks of its own.
pub const RICH: &[&str] = &["VGA", "virtio-net-pci,netdev=net0", "virtio-balloon-pci", "virtio-rng-pci", "qemu-xhci"];

/// A folder that no other test has, in RAM where there is a tmpfs; removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let shm = Path::new("/dev/shm");
        let place = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let name = format!("pageferry-qemu-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = place.join(name);
        std::fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("a UTF-8 path").to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The name of the backend of the machine's RAM, and of its RAM block.
pub const RAM: &str = "ram0";

pub struct Machine {
    child: Child,
    pub qmp: Qmp,
    pub serial: Serial,
    /// Its RAM. The file has no name any more, so that nothing stays behind, whoever is killed.
    pub ram: File,
    pub setup: Setup,
    scratch: Scratch,
}

/// Why a test does not run.
pub type Lacking = String;

impl Machine {
    /// Starts a machine; one that is to take a migration waits for it, and its guest stays paused after it.
    pub fn start(setup: Setup, incoming: bool) -> Result<Machine, Lacking> {
        let program = setup.version.program();
        let program = program.ok_or_else(|| format!("no {}x here (.ci/install fetches it)", setup.version.words()))?;
        let scratch = Scratch::new();
        let boot = setup.guest.arguments(Path::new(&scratch.file("")))?;
        let monitor = UnixListener::bind(scratch.file("qmp")).unwrap();
        monitor.set_nonblocking(true).unwrap();
        let errors = File::create(scratch.file("stderr")).unwrap();

        let mut command = Command::new(program);
        command.args(["-accel", "tcg", "-machine", &format!("{},memory-backend={RAM}", setup.machine)]);
        let size = format!("{}M", setup.ram_mib);
        let backend = format!("memory-backend-file,id={RAM},size={size},mem-path={},share=on", scratch.file("ram"));
        command.args(["-m", &size, "-object", &backend, "-smp", &setup.vcpus.to_string()]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args([
            "-chardev",
            &format!("socket,id=qmp,path={}", scratch.file("qmp")),
            "-mon",
            "chardev=qmp,mode=control",
        ]);
        command.args(["-serial", "stdio"]).args(boot);
        if setup.devices.iter().any(|device| device.contains("netdev=net0")) {
            command.args(["-netdev", "hubport,id=net0,hubid=0"]);
        }
        for device in setup.devices {
            command.args(["-device", device]);
        }
        if incoming {
            command.args(["-S", "-incoming", "defer"]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).spawn().unwrap();
        let serial = Serial::new(child.stdout.take().unwrap());
        let until = Instant::now() + PATIENCE;
        let stream = loop {
            if let Ok((stream, _)) = monitor.accept() {
                break stream;
            }
            let ended = child.try_wait().unwrap();
            let said = std::fs::read_to_string(scratch.file("stderr")).unwrap_or_default();
            assert!(ended.is_none(), "QEMU ended at once, {ended:?}: {said}");
            if Instant::now() > until {
                let _ = child.kill();
                panic!("QEMU does not come to its monitor: {said}");
            }
            thread::park_timeout(Duration::from_millis(2));
        };
        stream.set_nonblocking(false).unwrap();
        let qmp = Qmp::new(stream);
        let ram = File::open(scratch.file("ram")).unwrap();
        std::fs::remove_file(scratch.file("ram")).unwrap();
        Ok(Machine { child, qmp, serial, ram, setup, scratch })
    }

    /// Where the RAM can be read, as long as this process has it open.
    pub fn ram_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.ram.as_raw_fd()))
    }

    /// Waits until the guest has counted so far. Only where it has begun to.
    pub fn wait_for_number(&self, number: u32) {
        self.serial.wait_for_number(self.setup.guest.numbers(), number);
    }

    /// Listens for a migration at a port of its choice, or at this URI: where that is.
    pub fn listen(&mut self, wire: &Wire, uri: &str) -> Result<String, Lacking> {
        wire.set(self)?;
        let mut arguments = json!({ "uri": uri });
        if self.setup.version == Version::V10_0 {
            arguments["exit-on-error"] = json!(false);
        }
        self.qmp.run("migrate-incoming", arguments);
        let address = &self.qmp.run("query-migrate", json!({}))["socket-address"][0];
        Ok(format!("127.0.0.1:{}", address["port"].as_str().unwrap_or_default()))
    }

    /// Begins a migration to `address`.
    pub fn migrate_to(&mut self, address: &str) {
        self.qmp.run("migrate", json!({ "uri": format!("tcp:{address}") }));
    }

    pub fn query(&mut self) -> Value {
        self.qmp.run("query-migrate", json!({}))
    }

    /// What QEMU has said on its standard error.
    pub fn errors(&self) -> String {
        std::fs::read_to_string(self.scratch.file("stderr")).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it: its RAM, and all that its guest has printed.
    pub fn quit(mut self) -> (File, Vec<u8>) {
        let _ = self.qmp.try_run("quit", json!({}));
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "QEMU does not quit");
            thread::park_timeout(Duration::from_millis(2));
        }
        let ram = self.ram.try_clone().unwrap();
        let serial = std::mem::replace(&mut self.serial, Serial::new(std::io::empty()));
        (ram, serial.whole())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail on one that has ended already, and that is well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a migration travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wire {
    /// 0: without multifd.
    pub channels: u8,
    /// `none`, `zlib` or `zstd`.
    pub compression: &'static str,
    /// `none`, `legacy` or `multifd`; the machine type's own unless told.
    pub zero_pages: Option<&'static str>,
    pub zero_copy: bool,
    pub return_path: bool,
    pub switchover_ack: bool,
    /// Bytes a second, at the source.
    pub bandwidth: u64,
}

/// Two channels, a return path, no limit: what there is to vary.
pub const PLAIN: Wire = Wire {
    channels: 2,
    compression: "none",
    zero_pages: None,
    zero_copy: false,
    return_path: true,
    switchover_ack: false,
    bandwidth: 1 << 40,
};

impl Wire {
    /// Makes a machine ready to migrate like this. Says why it cannot.
    pub fn set(&self, machine: &mut Machine) -> Result<(), Lacking> {
        let on = [
            ("events", true),
            ("multifd", self.channels > 0),
            ("return-path", self.return_path),
            ("switchover-ack", self.switchover_ack),
            ("zero-copy-send", self.zero_copy),
        ];
        let mut parameters = json!({ "max-bandwidth": self.bandwidth });
        if self.channels > 0 {
            parameters["multifd-channels"] = json!(self.channels);
            parameters["multifd-compression"] = json!(self.compression);
        }
        if let Some(detection) = self.zero_pages {
            parameters["zero-page-detection"] = json!(detection);
        }
        machine.qmp.run("migrate-set-parameters", parameters);
        // Together: what one of them needs may come after it.
        let on = on.into_iter().filter(|(_, on)| *on);
        let on: Vec<_> = on.map(|(name, _)| json!({ "capability": name, "state": true })).collect();
        let set = machine.qmp.try_run("migrate-set-capabilities", json!({ "capabilities": on }));
        set.map(drop).map_err(|error| format!("QEMU refuses {self:?}: {error}"))
    }
}
