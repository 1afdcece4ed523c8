//! All that starts a QEMU: `tests/run` has a stage for it.

mod direct;
