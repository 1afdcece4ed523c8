//! The end of a main stream: what stands behind the RAM.
#![allow(dead_code)]
#![forbid(unsafe_code)]

/// How QEMU 10.0 describes no devices.
pub const DEVICES: &str = r#"{"configuration": {}, "page_size": 4096, "devices": []}"#;

/// These sections of devices, the end mark, and a description of devices.
pub fn tail(sections: &[u8], devices: &str) -> Vec<u8> {
    [sections, &[0, 6], &(devices.len() as u32).to_be_bytes(), devices.as_bytes()].concat()
}
