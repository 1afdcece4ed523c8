//! The program `pageferry`: ships a made-up guest to show how it goes, or a RAM image from one machine to another.
#![forbid(unsafe_code)]

mod child;
mod demo;
mod demo_target;
mod encrypted;
mod fill;
mod guest;
mod image;
mod interrupt;
mod limits;
mod mended;
mod output;
mod progress;
#[cfg(feature = "qemu")]
mod qemu;
mod receive;
mod report;
mod send;
mod settle;
mod sizes;
mod state;
mod store;
mod tls;
mod writers;
mod zero_copy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Ships the RAM of virtual machines: fast, over several channels, while the guest keeps writing.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, max_term_width = 100)]
#[command(after_help = "\
Examples:
  pageferry demo                                            migrate a made-up 2 GiB guest
  pageferry receive --listen 127.0.0.1:4444 --ram b.img     wait for a RAM image ...
  pageferry send --to 127.0.0.1:4444 --ram a.img            ... and send it, from another terminal
  pageferry qemu receive --listen 127.0.0.1:4444 --out vm   take a running VM from QEMU, and keep it

Exit codes: 0 completed, and verified where asked; 1 failed; 2 wrong usage;
3 uncertain: the other side may have taken over (`pageferry settle` asks it, and has exit codes of
its own); 130 cancelled by a signal (Ctrl-C).")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    // What each says of itself is at its `Args`.
    Demo(demo::Args),
    Send(send::Args),
    Receive(receive::Args),
    Settle(settle::Args),
    #[cfg(feature = "qemu")]
    Qemu(qemu::Args),
    #[command(hide = true)]
    DemoTarget(demo_target::Args),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Send(args) => send::run(&args),
        Command::Receive(args) => receive::run(&args),
        Command::Settle(args) => settle::run(&args),
        #[cfg(feature = "qemu")]
        Command::Qemu(args) => qemu::run(&args),
        Command::DemoTarget(args) => demo_target::run(&args),
    }
}
