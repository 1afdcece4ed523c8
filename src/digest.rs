//! Page digests.
