//! Which pages exist.
