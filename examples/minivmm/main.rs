//! A small VMM on KVM that shows how to link pageferry, and a guest that tells whether every page of it arrived.
//!
//! | file | what |
//! |---|---|
//! | `guest.s`, `guest.rs` | the guest's program, its memory map, what every page of it must hold |
//! | `vm.rs`, `vcpu.rs`, `control.rs`, `state.rs` | the VM: RAM, vCPUs, who may run when, registers as bytes |
//! | `device.rs`, `dma.rs` | its device: ports, and writes to guest RAM that KVM knows nothing of |
//! | `run.rs` | the program: a guest at home |
#![forbid(unsafe_op_in_unsafe_fn)]

mod clock;
mod control;
mod device;
mod dma;
mod guest;
mod options;
mod run;
mod state;
mod vcpu;
mod vm;

use std::process::ExitCode;

use clap::Parser;

/// A small VMM, and a guest that writes its RAM round and round and knows what every page must hold.
#[derive(Parser)]
#[command(name = "minivmm", version)]
enum Command {
    Run(run::Args),
}

fn main() -> ExitCode {
    match Command::parse() {
        Command::Run(args) => run::run(&args),
    }
}
