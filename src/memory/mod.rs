//! RAM blocks.

pub mod block;
pub mod hash;
pub mod presence;
pub mod zero;
