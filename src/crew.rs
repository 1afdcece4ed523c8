//! The life cycle of a crew of workers.
