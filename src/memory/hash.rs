//! The page hash.
