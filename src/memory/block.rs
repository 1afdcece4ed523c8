//! One RAM block.
