//! The one decision between cancel and commit.
