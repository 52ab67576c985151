//! A million balls on hilly terrain.
//!
//! The loss is the height, the gradient its slope, and the force on a ball minus that. Velocities start at zero,
//! momentum carries balls over small hills into deeper valleys, and friction lets them rest. Two populations start from
//! the same places and differ in their rule.
//!
//! What it shows beside that is how an optimizer lives in an engine that is not ours: [`view`] is given the engine's
//! device, queue and encoder each frame, [`landscape`] records slopes, steps and counts into it, and [`scene`] draws the
//! parameter buffers as vertices. Nothing here submits.

#[cfg(feature = "egui")]
pub mod app;
pub mod counts;
#[cfg(all(feature = "egui", not(target_arch = "wasm32")))]
pub mod headless;
pub mod landscape;
#[cfg(all(feature = "egui", target_arch = "wasm32"))]
pub mod page;
mod population;
pub mod scene;
pub mod settings;
#[cfg(all(feature = "egui", not(target_arch = "wasm32")))]
pub mod stage;
pub mod terrain;
#[cfg(feature = "egui")]
pub mod view;
