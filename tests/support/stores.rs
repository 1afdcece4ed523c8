//! Stores of QEMU's machines: the programs that write and read them, and what they say of themselves.
#![allow(dead_code)]
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::Value;

use crate::program::{Program, start};

/// The words that make the program receive a store.
pub fn receiver<'a>(store: &'a str, at: &'a str, channels: &'a str) -> [&'a str; 9] {
    ["qemu", "receive", "--listen", at, "--channels", channels, "--out", store, "--json"]
}

/// A program that receives a store, and its address.
pub fn receive(store: &str, channels: &str, more: &[&str]) -> (Program, String) {
    let mut program = start(&[&receiver(store, "127.0.0.1:0", channels), more].concat());
    let address = program.address();
    (program, address)
}

/// A program that sends one.
pub fn send(store: &str, to: &str, channels: &str, more: &[&str]) -> Program {
    let words = ["qemu", "send", "--to", to, "--channels", channels, "--in", store, "--json"];
    start(&[&words, more].concat())
}

pub fn manifest(store: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(Path::new(store).join("manifest.json")).unwrap()).unwrap()
}
