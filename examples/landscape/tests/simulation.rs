//! The simulation on an adapter, held against the terrains in double precision and the twin on the CPU.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod twin;

use landscape::counts::Figures;
use landscape::scene::Camera;
use landscape::settings::{RuleSettings, Settings};
use landscape::stage::Stage;
use landscape::terrain::{Domain, Terrain};
use wgpu_optim::{AdapterRequest, Gpu, SgdConfig, readback};

const SIZE: [u32; 2] = [128, 64];

fn stage(settings: &Settings) -> Stage {
    Stage::new(&AdapterRequest::default(), settings, SIZE)
        .expect("an adapter: `cargo xtask test` makes sure of one")
}

fn positions(stage: &Stage, side: usize) -> Vec<f32> {
    let Gpu { device, queue, .. } = &stage.gpu;
    let landscape = stage.landscape.lock();
    let numel = 2 * u64::from(landscape.settings().balls);
    readback::download_blocking(device, queue, landscape.params(side), 0, numel).unwrap()
}

fn figures_after(stage: &mut Stage, frames: u32) -> [Figures; 2] {
    for _ in 0..frames {
        stage.draw(&mut Camera::default(), 1, None);
    }
    stage.last_frame().unwrap().sides
}

/// Half an ULP of 1.
const U: f64 = f32::EPSILON as f64 / 2.0;

/// The most by which slopes in `f32` may differ from the exact ones of a terrain, anywhere in its domain: at most forty
/// roundings in a row, a division's 2.5 ULP among them, none of a value larger than the largest term of the sum. Terms
/// of like size that are summed fifteen times are in the factor.
fn slope_bound(terrain: Terrain) -> f64 {
    let Domain { centre, half_width } = terrain.domain();
    let x = centre[0].abs() + half_width;
    let y = centre[1].abs() + half_width;
    let largest = match terrain {
        Terrain::Ravine => 25.0 * y,
        Terrain::Rosenbrock => 400.0 * x * (y + x * x),
        Terrain::Himmelblau => 4.0 * (x + y) * (x * x + y + y * y + 11.0),
        Terrain::Saddle => y * y * y + y,
        Terrain::Hills => 15.0 * 4.0 * 1.6 / 0.35,
        // A place in the last octave is off by an ULP of 4 * 2 * 3, and slopes there change by 30 per unit.
        Terrain::Fractal => 5.0 * 0.6 * 2.0 + 30.0 * 24.0,
    };
    40.0 * U * largest
}

#[test]
fn steps_are_those_of_the_rule_down_the_slopes_of_the_terrain() {
    for terrain in Terrain::ALL {
        // An odd number, so that the slope of a ball beside the last is written, too.
        let settings = Settings::new(terrain, 1003, 7);
        let mut stage = stage(&settings);
        let starts = positions(&stage, 1);
        assert_eq!(
            starts,
            positions(&stage, 0),
            "both sides start from the same places"
        );
        let rule = settings.rules[1].config().unwrap();
        let rule = SgdConfig::try_from(rule).unwrap();
        // The first step moves by the slopes alone; what momentum makes of later ones is the library's to prove.
        figures_after(&mut stage, 1);
        let after = positions(&stage, 1);
        let mut worst = 0.0_f64;
        for (start, after) in starts.chunks(2).zip(after.chunks(2)) {
            let slope = terrain.slope(f64::from(start[0]), f64::from(start[1]));
            for ((start, after), slope) in start.iter().zip(after).zip(slope) {
                let expected = f64::from(*start) - rule.lr() * slope;
                let step_rounding = 3.0 * U * (f64::from(*start).abs() + (rule.lr() * slope).abs());
                let bound = rule.lr() * slope_bound(terrain) + step_rounding;
                worst = worst.max((f64::from(*after) - expected).abs() / bound);
            }
        }
        assert!(worst <= 1.0, "{terrain:?}: {worst} of the bound");
    }
}

#[test]
fn momentum_finds_the_deepest_valley_more_often_as_the_twin_says() {
    for terrain in [Terrain::Hills, Terrain::Fractal] {
        let settings = Settings::new(terrain, 2001, 3);
        let mut stage = stage(&settings);
        let starts = positions(&stage, 0);
        let on_gpu = figures_after(&mut stage, 100);
        twin::agrees(&settings, &starts, 100, on_gpu);
    }
}

#[test]
fn figures_are_those_of_the_positions() {
    for (terrain, balls) in [
        (Terrain::Hills, 1),
        (Terrain::Saddle, 70_001),
        (Terrain::Ravine, 300),
    ] {
        let mut settings = Settings::new(terrain, balls, 11);
        // Fast enough for balls to escape, and for numbers to overflow.
        if terrain == Terrain::Ravine {
            settings.rules[0].lr = 0.5;
        }
        let mut stage = stage(&settings);
        figures_after(&mut stage, 39);
        let before = [positions(&stage, 0), positions(&stage, 1)];
        let figures = figures_after(&mut stage, 1);
        for (side, before) in before.iter().enumerate() {
            let after = positions(&stage, side);
            let near = 4.0 * terrain.domain().half_width as f32;
            let is_near = |p: &[f32]| p.iter().all(|at| at.abs() < near);
            let stayed: Vec<_> = after.chunks(2).filter(|p| is_near(p)).collect();
            let heights = stayed
                .iter()
                .map(|p| terrain.height(f64::from(p[0]), f64::from(p[1])));
            let height = heights.clone().sum::<f64>() / (stayed.len() as f64).max(1.0);
            let magnitude = heights.map(f64::abs).sum::<f64>() / (stayed.len() as f64).max(1.0);
            let ways = before
                .chunks(2)
                .zip(after.chunks(2))
                .take(65_536)
                .filter(|(_, p)| is_near(p));
            let way = ways
                .map(|(a, b)| f64::from(a[0] - b[0]).hypot(f64::from(a[1] - b[1])))
                .sum::<f64>();
            let speed = way / f64::from(balls.min(65_536));

            // A lane adds up every 16384th ball, eight more sums are in the workgroup and as many after it. A height of
            // the ravine is at most five roundings off, one of the hills forty of its largest term.
            let sums = f64::from(balls) / 16_384.0 + 1.0 + 16.0;
            let of_height = 40.0 * U * 15.0 * 1.6 + 10.0 * U * magnitude;
            let Figures {
                mean_height,
                mean_speed,
                deepest_share,
                escaped_share,
            } = figures[side];
            assert!(
                (mean_height - height).abs() <= sums * U * magnitude + of_height,
                "{mean_height} for {height}"
            );
            assert!(
                (mean_speed - speed).abs() <= (sums + 16.0) * U * speed,
                "{mean_speed} for {speed}"
            );
            let deepest = twin::in_the_deepest(terrain, &after)
                .iter()
                .filter(|is_deepest| **is_deepest)
                .count();
            // A ball on the rim is on either side of it by a rounding.
            assert!((deepest_share * f64::from(balls) - deepest as f64).abs() <= 1.0);
            let escaped = after.chunks(2).count() - stayed.len();
            assert_eq!((escaped_share * f64::from(balls)).round() as usize, escaped);
            assert!(
                terrain != Terrain::Ravine || side == 1 || escaped > 0,
                "nobody escaped"
            );
        }
    }
}

/// wgpu numbers what is submitted to a queue (and takes numbers after that, for what an encoder wants called).
fn number(index: &wgpu_optim::wgpu::SubmissionIndex) -> u64 {
    let text = format!("{index:?}");
    text.matches(|c: char| c.is_ascii_digit())
        .collect::<String>()
        .parse()
        .unwrap()
}

#[test]
fn a_frame_is_one_submission_and_it_is_the_engine_s() {
    let mut settings = Settings::new(Terrain::Hills, 5000, 1);
    settings.rules[0].rule = "adam";
    let mut stage = stage(&settings);
    let mut camera = Camera::default();
    stage.draw(&mut camera, 3, None);
    for _ in 0..5 {
        let before = number(&stage.gpu.queue.submit([]));
        let frame = number(&stage.draw(&mut camera, 1, None));
        assert_eq!(frame, before + 1, "submissions");
    }
    assert_eq!(stage.last_frame().unwrap().steps, 8);
}

#[test]
fn a_run_repeats_itself_and_starts_again() {
    let settings = Settings::new(Terrain::Fractal, 777, 5);
    let mut stage = stage(&settings);
    figures_after(&mut stage, 20);
    let first = [positions(&stage, 0), positions(&stage, 1)];
    stage.landscape.lock().restart().unwrap();
    assert_eq!(stage.landscape.lock().steps(), 0);
    let figures = figures_after(&mut stage, 20);
    assert_eq!(first, [positions(&stage, 0), positions(&stage, 1)]);
    assert_eq!(figures, figures_after(&mut self::stage(&settings), 20));
}

/// The fate of a frame that an engine has recorded.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Presented,
    /// egui, where its window has no texture: it submits, but nothing.
    EncoderDropped,
    CommandsDropped,
}

impl Fate {
    fn of(self, stage: &mut Stage, steps: u32) {
        let recorded = stage.record(&mut Camera::default(), steps, None);
        match self {
            Self::Presented => drop(stage.present(recorded)),
            Self::EncoderDropped => drop(recorded),
            Self::CommandsDropped => drop(recorded.encoder.finish()),
        }
        if self != Self::Presented {
            stage.gpu.queue.submit([]);
        }
        // As the program does before its next frame.
        stage.landscape.lock().newest();
    }
}

/// Changes settings between frames, dropped ones or not.
fn meddle(stage: &mut Stage, frame: u32) {
    let mut landscape = stage.landscape.lock();
    let mut settings = landscape.settings().clone();
    match frame {
        10 => settings.rules[1].lr *= 0.5,
        14 => settings.rules = [RuleSettings::sgd(0.01, 0.9), RuleSettings::sgd(0.01, 0.5)],
        18 => settings.rules[0].rule = "adam",
        22 => settings.rules[1].rule = "schedule-free-adamw",
        26 => return landscape.restart().unwrap(),
        30 => settings.terrain = Terrain::Saddle,
        34 => {
            drop(landscape);
            return stage.resize([256, 80]);
        }
        _ => return,
    }
    landscape.apply(&settings).unwrap();
}

#[test]
fn a_frame_that_the_engine_drops_has_never_been_recorded() {
    for seed in 0..4 {
        let mut random = fastrand::Rng::with_seed(seed);
        let settings = Settings::new(Terrain::Hills, 1003, 7);
        let (mut always_seen, mut hidden) = (stage(&settings), stage(&settings));
        for frame in 0..40 {
            meddle(&mut always_seen, frame);
            meddle(&mut hidden, frame);
            let steps = random.u32(0..4);
            let fate = match frame % 10 {
                // The first, and several in a row; those after a change, too.
                0..3 if seed % 2 == 0 => Fate::EncoderDropped,
                3..7 => Fate::EncoderDropped,
                _ => [Fate::Presented, Fate::EncoderDropped, Fate::CommandsDropped]
                    [random.usize(..3)],
            };
            fate.of(&mut hidden, steps);
            if fate == Fate::Presented {
                fate.of(&mut always_seen, steps);
                let [expected, actual] = [&always_seen, &hidden].map(|stage| {
                    let last = stage.last_frame().unwrap();
                    (last.steps, last.sides, stage.landscape.lock().steps())
                });
                assert_eq!(actual, expected, "seed {seed}, frame {frame}");
                assert_eq!(actual.0, actual.2, "the device and the host count alike");
                for side in 0..2 {
                    let positions = [&always_seen, &hidden].map(|stage| positions(stage, side));
                    assert_eq!(
                        positions[0], positions[1],
                        "seed {seed}, frame {frame}, side {side}"
                    );
                }
            }
        }
        assert_eq!(hidden.landscape.lock().failure(), None);
        for stage in [&mut always_seen, &mut hidden] {
            stage.draw(&mut Camera::default(), 1, None);
        }
        assert_eq!(hidden.picture().unwrap(), always_seen.picture().unwrap());
    }
}

/// An engine that records a frame while another one is open asks for figures, and drops the first.
#[test]
fn figures_are_asked_for_at_any_time_and_are_those_of_what_was_submitted() {
    let settings = Settings::new(Terrain::Hills, 500, 2);
    let mut stage = stage(&settings);
    let mut camera = Camera::default();
    let first = stage.record(&mut camera, 2, None);
    assert_eq!(stage.landscape.lock().newest(), None);
    let second = stage.record(&mut camera, 3, None);
    stage.wait().unwrap();
    assert_eq!(stage.landscape.lock().newest(), None);
    assert_eq!(stage.landscape.lock().steps(), 5);
    drop(first);
    assert_eq!(stage.landscape.lock().steps(), 3);
    stage.present(second);
    let frame = stage.last_frame().unwrap();
    assert_eq!(frame.steps, 3);
    let figures = figures_after(&mut self::stage(&settings), 3);
    // Three steps in one frame, and one in each of three.
    assert_eq!(figures[0].mean_height, frame.sides[0].mean_height);
    assert_eq!(figures[1].deepest_share, frame.sides[1].deepest_share);
}

#[test]
fn settings_change_as_a_run_goes_on_and_wrong_ones_change_nothing() {
    let mut settings = Settings::new(Terrain::Hills, 500, 2);
    let mut stage = stage(&settings);
    figures_after(&mut stage, 5);
    let kept = positions(&stage, 1);
    settings.rules[1].lr = -1.0;
    assert!(stage.landscape.lock().apply(&settings).is_err());
    settings.rules[1] = RuleSettings {
        friction: 100.0,
        ..RuleSettings::sgd(0.1, 0.9)
    };
    settings.rules[1].form = wgpu_optim::rules::sgd::MomentumForm::Particle;
    settings.rules[0].lr = 0.5;
    assert!(stage.landscape.lock().apply(&settings).is_err());
    assert_eq!(
        stage.landscape.lock().settings().rules[0].lr,
        Terrain::Hills.lr()
    );
    let too_many = Settings {
        balls: u32::MAX,
        ..stage.landscape.lock().settings().clone()
    };
    assert!(stage.landscape.lock().apply(&too_many).is_err());
    assert_eq!(positions(&stage, 1), kept);

    settings.rules[1].friction = 1.0;
    stage.landscape.lock().apply(&settings).unwrap();
    figures_after(&mut stage, 5);
    assert_eq!(stage.landscape.lock().steps(), 10);
    for rule in RuleSettings::names() {
        settings.rules[0].rule = rule;
        stage.landscape.lock().apply(&settings).unwrap();
        let before = positions(&stage, 0);
        figures_after(&mut stage, 1);
        assert_ne!(before, positions(&stage, 0), "{rule}");
    }
    settings.terrain = Terrain::Saddle;
    stage.landscape.lock().apply(&settings).unwrap();
    assert_eq!(stage.landscape.lock().steps(), 0);
}

#[test]
fn the_picture_shows_terrain_and_balls_of_both_sides() {
    for balls in [900, 200_000] {
        let mut stage = stage(&Settings::new(Terrain::Hills, balls, 1));
        stage.draw(&mut Camera::default(), 1, None);
        let picture = stage.picture().unwrap();
        let count = |is: fn(&[u8]) -> bool, from: u32| {
            let pixels = picture.enumerate_pixels();
            pixels
                .filter(|(x, _, pixel)| x / 64 == from && is(&pixel.0))
                .count()
        };
        let orange = |p: &[u8]| p[0] > 120 && p[0] > p[2].saturating_add(40);
        let blue = |p: &[u8]| p[2] > 120 && p[2] > p[0].saturating_add(40);
        let (left, right) = (count(orange, 0), count(blue, 1));
        assert!(
            left > 100 && right > 100,
            "{balls}: {left} orange, {right} blue pixels"
        );
        // Of the other side's colour there is what smoothing leaves.
        assert!(count(blue, 0) < 20 && count(orange, 1) < 20, "{balls}");
    }
}
