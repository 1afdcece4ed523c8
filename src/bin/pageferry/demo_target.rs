//! `pageferry demo-target`: the other side of `demo`, in a process of its own.

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use pageferry::memory::{Backing, Initial};
use pageferry::sys::thread::process_cpu_time;
use pageferry::units::BlockId;
use pageferry::wire::control::Setup;
use pageferry::{CancelHandle, HookError, Incoming, Ram, RamBlock, Target};

use crate::child::Said;
use crate::demo::Transport;
use crate::output::{Output, complain};
use crate::receive::listen_advice;
use crate::report::{Report, TargetPart};
use crate::sizes::Cpus;
use crate::state::{TAG, check, decode};
use crate::tls::TlsArgs;

/// The other side of `demo`, which starts it. Ends when its standard input does.
#[derive(clap::Args)]
pub struct Args {
    /// How the guest travels
    #[arg(long)]
    transport: Transport,
    /// CPUs for the receiving threads
    #[arg(long)]
    cpus: Option<Cpus>,
    #[command(flatten)]
    tls: TlsArgs,
}

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(true);
    match take_in(args, out) {
        Ok(report) => {
            let code = report.outcome.exit_code();
            out.event(&Said::Report(report));
            code
        }
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}

fn take_in(args: &Args, out: Output) -> Result<TargetPart, String> {
    let folder = match args.transport {
        Transport::Tcp => None,
        Transport::Unix => Some(PrivateFolder::new().map_err(|e| format!("cannot make a folder for a socket: {e}"))?),
    };
    let address = match &folder {
        Some(folder) => format!("unix:{}", folder.0.join("socket").display()),
        None => "127.0.0.1:0".to_owned(),
    };
    let cpus = args.cpus.clone().unwrap_or_default().0;
    let builder = match args.tls.load()? {
        Some(tls) => Target::builder().tls(tls),
        None => Target::builder(),
    };
    let target = builder.cpus(cpus).listen(&address).map_err(|e| listen_advice(&e))?;
    end_with_stdin(target.cancel_handle()).map_err(|e| format!("no thread to watch standard input: {e}"))?;
    let addr = target.address().map(|address| address.to_string()).unwrap_or(address);
    out.event(&Said::Listening { addr });
    let mut vm = Vm::default();
    let report = target.receive(&mut vm);
    let report = Report::of_target("demo-target", report, process_cpu_time().unwrap_or_default());
    Ok(TargetPart {
        pid: std::process::id(),
        outcome: report.outcome,
        error: report.error,
        verified: report.verified,
        writers_checked: vm.writers_checked,
        recv_syscalls: report.recv_syscalls.unwrap_or_default(),
        cpu_s: report.cpu_s,
        cpus: report.cpus,
        remarks: report.remarks,
    })
}

/// How long the clean way out may take before the hard one is taken.
const END: Duration = Duration::from_secs(4);

/// Whoever started this process holds the other end of its standard input, and closes it at its own end, however that
/// comes about.
fn end_with_stdin(cancel: CancelHandle) -> io::Result<()> {
    thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        cancel.cancel();
        // The process ends before this is over, unless something hangs.
        let until = std::time::Instant::now() + END;
        while std::time::Instant::now() < until {
            thread::park_timeout(END);
        }
        std::process::exit(1);
    })?;
    Ok(())
}

/// A folder that only this user may look into, removed with the socket in it.
struct PrivateFolder(PathBuf);

impl PrivateFolder {
    fn new() -> io::Result<PrivateFolder> {
        let path = std::env::temp_dir().join(format!("pageferry-demo-{}", std::process::id()));
        // Fails if it is there already: somebody else's folder is not private.
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(PrivateFolder(path))
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The demo's VM at its new home.
#[derive(Default)]
struct Vm {
    ram: Option<Ram>,
    writers_checked: usize,
}

impl Incoming for Vm {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        if setup.opaque != TAG {
            return Err("what comes is not the guest of a demo".into());
        }
        let fresh = |b: &pageferry::wire::control::BlockInfo| {
            let block = RamBlock::anonymous(&b.name, b.guest_address, b.bytes, b.page_size, Backing::Base);
            block.map(|block| block.with_initial(Initial::Zeroed))
        };
        let blocks = setup.blocks.iter().map(fresh).collect::<Result<Vec<_>, _>>()?;
        let ram = Ram::new(blocks)?;
        self.ram = Some(ram.clone());
        Ok(ram)
    }

    /// The state has to be whole, and to fit the RAM that came with it: a guest torn between two moments is no guest.
    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        let mut bytes = Vec::new();
        state.read_to_end(&mut bytes)?;
        let block = self.ram.as_ref().and_then(|ram| ram.block(BlockId(0))).ok_or("there is no RAM")?;
        self.writers_checked = check(block, &decode(&bytes)?)?;
        Ok(())
    }

    fn run(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn discard(&mut self) {
        self.ram = None;
    }
}
