//! The guide: short pages on what programs do around a step. Each is a file in `docs/guide/`, and runs as a test.
//!
//! | page | content |
//! |---|---|
//! | [`weight_tying`] | one tensor with two uses |
//! | [`accumulation`] | one step for several micro-batches |
//! | [`averages`] | exponential moving averages of weights |
//! | [`masters`] | `f32` masters carried to another rule |
//! | [`schedule_free`] | evaluating schedule-free on the device |
//! | [`rows`] | rows that come and go |
//! | [`edits`] | parameters that a program writes |
//! | [`custom_rules`] | names that the frame takes from rules of one's own |

macro_rules! pages {
    ($($page:ident),* $(,)?) => {
        $(
            #[doc = include_str!(concat!("../docs/guide/", stringify!($page), ".md"))]
            pub mod $page {}
        )*
    };
}

pages! {
    accumulation, averages, custom_rules, edits, masters, rows, schedule_free, weight_tying,
}
