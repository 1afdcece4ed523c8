//! Tracking by write protection.
