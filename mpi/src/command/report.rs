//! The report of a round, as printed.

use std::fmt::Write as _;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Report {
    pub ranks: usize,
    /// The backend of the first rank; the two after it are the first rank's, too.
    pub backend: &'static str,
    pub adapter: String,
    pub reason: String,
    /// The number of this round.
    pub outer_step: u64,
    pub tensors: usize,
    /// Tensors of other dtypes, as the global model has them.
    pub copied_tensors: usize,
    pub numel: u64,
    pub weights: Vec<f64>,
    /// The sum over all ranks.
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub bytes_sent: u64,
    /// The most memory of any rank, as far as the system says.
    pub peak_memory_bytes: u64,
    pub total_ms: f64,
}

impl Report {
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<12}{value}");
        };
        line("ranks", self.ranks.to_string());
        line("device", format!("{}: {}", self.backend, self.adapter));
        line("why", self.reason.clone());
        line("round", self.outer_step.to_string());
        let mut tensors = format!("{} updated", self.tensors);
        if self.copied_tensors > 0 {
            tensors += &format!(", {} copied, of other dtypes", self.copied_tensors);
        }
        line("tensors", tensors);
        line("parameters", self.numel.to_string());
        let weights: Vec<_> = self.weights.iter().map(f64::to_string).collect();
        line("weights", weights.join(", "));
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        line(
            "moved",
            format!(
                "{} read, {} written, {} sent, by all ranks together",
                mib(self.bytes_read),
                mib(self.bytes_written),
                mib(self.bytes_sent)
            ),
        );
        line(
            "memory",
            format!("{} at most on a rank", mib(self.peak_memory_bytes)),
        );
        line("time", format!("{:.1} ms", self.total_ms));
        text
    }
}
