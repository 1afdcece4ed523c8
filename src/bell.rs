//! Sleep and wake in one word.
