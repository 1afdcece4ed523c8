//! Words to runs.
