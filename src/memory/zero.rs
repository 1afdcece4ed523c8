//! The zero test.
