//! A bitmap the VMM marks.
