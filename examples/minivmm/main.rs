//! A small VMM on KVM that shows how to link pageferry, and a guest that tells whether every page of it arrived.
//!
//! | file | what |
//! |---|---|
//! | `ferry.rs` | **all that the VMM has to do with pageferry** |
//! | `vm.rs`, `vcpu.rs`, `control.rs`, `state.rs` | the VM: RAM, vCPUs, who may run when, registers as bytes |
//! | `device.rs`, `dma.rs` | its device: ports, and writes to guest RAM that KVM knows nothing of |
//! | `guest.s`, `guest.rs` | the guest's program, its memory map, what every page of it must hold |
//! | `demo.rs`, `process.rs`, `show.rs`, `report.rs` | `minivmm demo`: two VMM processes and a guest between them |
//! | `child.rs`, `protocol.rs` | one of these processes, and what it is told |
//! | `run.rs` | `minivmm run`: a guest at home, to see that the VMM works |
//! | `with_mutants.rs` | two mistakes that the guest has to find |

mod child;
mod clock;
mod control;
mod demo;
mod device;
mod dma;
mod ferry;
mod guest;
mod options;
mod process;
mod protocol;
mod report;
mod run;
mod show;
mod state;
mod vcpu;
mod vm;
mod with_mutants;

use std::process::ExitCode;

use clap::Parser;

/// A small VMM, and a guest that writes its RAM round and round and knows what every page must hold.
#[derive(Parser)]
#[command(name = "minivmm", version)]
enum Command {
    Demo(demo::Args),
    Run(run::Args),
    /// One VMM process of the demo, which starts it
    #[command(hide = true)]
    Vmm,
}

fn main() -> ExitCode {
    match Command::parse() {
        Command::Demo(args) => demo::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Vmm => child::run(),
    }
}
