//! `pageferry qemu`: takes migrations from QEMU, and gives them to QEMU.

mod receive;
mod relay;
mod send;
mod words;

use std::num::NonZeroUsize;
use std::process::ExitCode;

use clap::Subcommand;
use pageferry::Ram;

use crate::output::Output;
use crate::report::Report;

/// Speak QEMU's own migration stream: with multifd or without, as QEMU 10.0 and 7.2 do.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    // What each says of itself is at its `Args`.
    Receive(receive::Args),
    Relay(relay::Args),
    Send(send::Args),
}

pub fn run(args: &Args) -> ExitCode {
    match &args.command {
        Command::Receive(args) => receive::run(args),
        Command::Relay(args) => relay::run(args),
        Command::Send(args) => send::run(args),
    }
}

/// Prints the report, and only then parts with RAM: who waits for the report does not wait for that.
fn end(out: Output, report: &Report, ram: Option<Ram>) -> ExitCode {
    let code = out.end(report);
    if let Some(ram) = ram {
        ram.unmap(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
    }
    code
}
