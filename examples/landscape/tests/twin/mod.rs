//! The balls of a side on the CPU twin, with slopes in `f32`.

use landscape::counts::Figures;
use landscape::settings::Settings;
use landscape::terrain::Terrain;
use wgpu_optim::CpuOptimizer;

/// The positions of balls after so many steps from `starts`.
fn ends(settings: &Settings, starts: &[f32], side: usize, steps: u32) -> Vec<f32> {
    let rule = settings.rules[side].config().unwrap();
    let mut positions = starts.to_vec();
    let mut twin = CpuOptimizer::new(rule, [("balls", [positions.len()])]).unwrap();
    for _ in 0..steps {
        let balls = positions.chunks(2);
        let slopes: Vec<f32> = balls
            .flat_map(|p| settings.terrain.slope(p[0], p[1]))
            .collect();
        twin.step(&mut [&mut positions], &[&slopes]).unwrap();
    }
    positions
}

/// For each ball, whether it is in the deepest valley.
pub fn in_the_deepest(terrain: Terrain, positions: &[f32]) -> Vec<bool> {
    let balls = positions.chunks(2);
    balls
        .map(|p| terrain.is_deepest(f64::from(p[0]), f64::from(p[1])))
        .collect()
}

/// Checks that a device counts as many balls in the deepest valley as the twin, but for those near a ridge, which go
/// either way by a rounding: those that end elsewhere when they start a thousand roundings away.
pub fn agrees(settings: &Settings, starts: &[f32], steps: u32, on_device: [Figures; 2]) {
    let half_width = settings.terrain.domain().half_width as f32;
    let balls = settings.balls as usize;
    for (side, figures) in on_device.into_iter().enumerate() {
        let [as_is, up, down] = [0.0, 1e-4, -1e-4].map(|by| {
            let nudged: Vec<_> = starts.iter().map(|at| at + by * half_width).collect();
            in_the_deepest(settings.terrain, &ends(settings, &nudged, side, steps))
        });
        let is_undecided = |ball: &usize| up[*ball] != as_is[*ball] || down[*ball] != as_is[*ball];
        let undecided = (0..balls).filter(is_undecided).count();
        assert!(undecided < balls / 10, "{undecided} undecided");
        let expected = as_is.iter().filter(|is_deepest| **is_deepest).count();
        let counted = (figures.deepest_share * f64::from(settings.balls)).round();
        let apart = (counted - expected as f64).abs();
        assert!(
            apart <= undecided as f64,
            "{:?}, side {side}: {counted} on the device, {expected} on the CPU, {undecided} undecided",
            settings.terrain
        );
    }
    let [plain, momentum] = on_device.map(|figures| figures.deepest_share);
    assert!(momentum > 1.5 * plain, "{momentum} against {plain}");
}
