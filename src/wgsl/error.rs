//! Rules and devices for which there are no kernels.

/// Pipelines that could not be built on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A device limit below what the kernels need.
    #[error(
        "device limit {limit} = {actual} is too low for the kernels: expected at least {required}"
    )]
    LimitTooLow {
        /// Name of the limit in `wgpu::Limits`.
        limit: &'static str,
        /// The least that works.
        required: u64,
        /// The limit of the device.
        actual: u64,
    },
    /// A rule that does not give the scalars that it names, or names too many.
    #[error(
        "rule {rule:?} names {expected} scalars and gives {actual}, expected as many, and 16 at most"
    )]
    Scalars {
        /// The rule's stem.
        rule: &'static str,
        /// The number of scalars that it names.
        expected: usize,
        /// The number of scalars that it gives.
        actual: usize,
    },
    /// A rule that names more sums than it may take.
    #[error("rule {rule:?} names {actual} sums, expected {most} at most")]
    Sums {
        /// The rule's stem.
        rule: &'static str,
        /// The most that there may be.
        most: usize,
        /// The number of sums that it names.
        actual: usize,
    },
    /// A rule whose WGSL does not declare the function that steps four elements, or otherwise than it is called.
    #[error(
        "the WGSL of rule {rule:?} declares {}: expected `fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, \
         state: ptr<function, State>) -> vec4<f32>`",
        actual.as_ref().map_or_else(|| "no `fn update`".to_owned(), |actual| format!("`{actual}`"))
    )]
    Signature {
        /// The rule's stem.
        rule: &'static str,
        /// The declaration, if there is a function of that name.
        actual: Option<String>,
    },
    /// The device refused a shader, a layout or a pipeline. Lines of a rule's WGSL are counted as it does.
    #[error("the device refused the kernel {kernel}: {message}")]
    Device {
        /// Label of the kernel.
        kernel: String,
        /// The message of wgpu.
        message: String,
    },
}
