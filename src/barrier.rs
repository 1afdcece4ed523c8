//! The per-round barrier of the target's lanes.
