//! Measurements of the kernels, and of variants of them, on real GPU compilers and software adapters: `cargo xtask isa`
//! and `cargo xtask variants`.

mod adapter;
mod candidates;
mod figures;
mod isa;
mod kernels;
mod radv;
mod spirv;
mod variants;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
enum Command {
    /// Compiles the kernels to machine code for AMD GPUs, which need not be there
    Isa(isa::IsaArgs),
    /// Measures candidates for the momentum kernel side by side
    Variants(variants::VariantsArgs),
    /// Compiles on this process's driver, for another process of this program
    #[command(name = radv::CHILD, hide = true)]
    RadvChild,
    /// Measures on this process's adapter, for another process of this program
    #[command(name = adapter::CHILD, hide = true)]
    AdapterChild { only: String },
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Isa(args) => isa::run(&args),
        Command::Variants(args) => variants::run(&args),
        Command::RadvChild => radv::run_child(),
        Command::AdapterChild { only } => adapter::run_child(&only),
    }
}
