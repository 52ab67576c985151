//! The guide: a page for each task. Each is a file in `docs/guide/`, and its code runs as a test.
//!
//! | page | content |
//! |---|---|
//! | [`embedding`] | a step in the encoder of an engine, and the contract |
//! | [`rules`] | every rule with its formula, defaults, state and bytes; the forms of momentum |
//! | [`many_tensors`] | arenas, pools and batches; groups; frozen tensors |
//! | [`mixed_precision`] | 16-bit parameters, gradients and state, and masters |
//! | [`control`] | clipping, loss scale and skipped steps, decided on the device |
//! | [`files`] | models, states, checkpoints, PyTorch's states |
//! | [`command`] | `wgpu-optim step`, `round`, `bench` and the rest |
//! | [`many_processes`] | sharded state and rounds of local training over MPI |
//! | [`custom_rules`] | a rule of one's own, and the names that the frame takes |
//! | [`weight_tying`] | one tensor with two uses |
//! | [`accumulation`] | one step for several micro-batches |
//! | [`averages`] | exponential moving averages of weights |
//! | [`masters`] | `f32` masters carried to another rule |
//! | [`schedule_free`] | evaluating schedule-free on the device |
//! | [`rows`] | rows that come and go |
//! | [`edits`] | parameters that a program writes |
//! | [`accuracy`] | how exact each rule is, and what is not promised |
//! | [`benchmarks`] | figures with device, date and command |
//! | [`examples`] | the examples, and a gallery of the pictures |
//! | [`questions`] | what each common error means and what to do |

// Pages refer to each other by labels, which each defines for readers of the files. In front of it stand definitions for
// rustdoc, and of two the first one holds.
macro_rules! pages {
    ($($page:ident),* $(,)?) => {
        macro_rules! labels {
            () => {
                concat!(
                    $("[", stringify!($page), "]: crate::guide::", stringify!($page), "\n",)*
                    "[all-rules]: crate::guide::rules#all-rules\n",
                    "[forms]: crate::guide::rules#forms-of-momentum\n",
                    "[costs-of-clipping]: crate::guide::benchmarks#clipping\n",
                    "[costs-of-files]: crate::guide::benchmarks#files\n",
                    "[costs-of-many]: crate::guide::benchmarks#many-tensors\n",
                    "[training]: crate::guide::examples#training\n",
                )
            };
        }

        $(
            #[doc = labels!()]
            #[doc = include_str!(concat!("../docs/guide/", stringify!($page), ".md"))]
            pub mod $page {}
        )*
    };
}

pages! {
    accumulation, accuracy, averages, benchmarks, command, control, custom_rules, edits, embedding, examples, files,
    many_processes, many_tensors, masters, mixed_precision, questions, rows, rules, schedule_free, weight_tying,
}
