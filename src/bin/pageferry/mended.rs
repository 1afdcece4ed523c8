//! What was lost or damaged on the way and made good, in the report.

use std::fmt;

use pageferry::{SourceReport, TargetReport};
use serde::Serialize;

use crate::sizes::human;

/// Losses and damage that did not end the migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Mended {
    /// Connections of data channels that were lost.
    channels_lost: u32,
    /// How often one of them was connected again, and used.
    #[serde(skip_serializing_if = "Option::is_none")]
    reconnects: Option<u32>,
    /// How often all connections were lost, and the session was taken up again.
    resumes: u32,
    /// How often digests disagreed, and chunks travelled again.
    repairs: u32,
    /// Bytes that travelled again as nobody knew whether they had landed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reshipped_bytes: Option<u64>,
    /// Bytes that travelled again as digests disagreed.
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired_bytes: Option<u64>,
}

impl From<&SourceReport> for Mended {
    fn from(report: &SourceReport) -> Mended {
        Mended {
            channels_lost: report.channels_lost,
            reconnects: Some(report.reconnects),
            resumes: report.resumes,
            repairs: report.repairs,
            reshipped_bytes: Some(report.reshipped_bytes),
            repaired_bytes: Some(report.repaired_bytes),
        }
    }
}

impl From<&TargetReport> for Mended {
    fn from(report: &TargetReport) -> Mended {
        Mended {
            channels_lost: report.channels_lost,
            resumes: report.resumes,
            repairs: report.repairs,
            ..Mended::default()
        }
    }
}

impl fmt::Display for Mended {
    /// A line, where there is anything to tell.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.channels_lost > 0 {
            parts.push(format!("{} lost connections", self.channels_lost));
        }
        if let Some(reconnects) = self.reconnects.filter(|n| *n > 0) {
            parts.push(format!("{reconnects} made again"));
        }
        if let Some(bytes) = self.reshipped_bytes.filter(|n| *n > 0) {
            parts.push(format!("{} sent again", human(bytes)));
        }
        if self.resumes > 0 {
            parts.push(format!("all lost and taken up again: {}", self.resumes));
        }
        if self.repairs > 0 {
            parts.push(format!("damage repaired: {}", self.repairs));
        }
        if parts.is_empty() { Ok(()) } else { writeln!(f, "  made good   {}", parts.join(", ")) }
    }
}
