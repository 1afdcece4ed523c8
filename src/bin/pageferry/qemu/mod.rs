//! `pageferry qemu`: takes migrations from QEMU, and gives them to QEMU.

mod receive;
mod relay;
mod send;
mod words;

use std::process::ExitCode;

use clap::Subcommand;

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
