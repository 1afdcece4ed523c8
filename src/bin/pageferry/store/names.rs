//! Names of RAM blocks as names of files, and paths that stay inside the store.

use super::BLOCKS;

/// Bytes of a block's name that its file's name keeps.
const KEPT_BYTES: usize = 100;

/// The path, in the store, of the file for the block of this number. Blocks of different numbers have different files,
/// whatever they are called; what the file is called means nothing, the manifest has the block's name.
pub fn block_path(number: usize, name: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "._@+-".contains(c) { c } else { '_' };
    let kept: String = name.chars().map(safe).take(KEPT_BYTES).collect();
    let body = kept.trim_start_matches('.');
    let dots = "_".repeat(kept.len() - body.len());
    format!("{BLOCKS}/{number:02}-{dots}{body}.ram")
}

/// Whether a path names something below the folder it is relative to, by its text alone.
pub fn stays_inside(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}
