//! Hilly terrains with known minima, and their slopes.
//!
//! Sums, products, quotients and whole parts only, no sines or powers: WGSL bounds the error of those, so a terrain is
//! the same on every adapter to a few roundings. Each terrain is written twice, here over any float and in
//! `shaders/terrain.wgsl`; its numbers stand here alone.

use std::fmt::Write as _;

use num_traits::Float;

/// A number as the terrains compute in: `f32` as the GPU, `f64` to hold it against.
pub trait Real: Float + From<f32> {}
impl<T: Float + From<f32>> Real for T {}

/// A surface that the balls roll on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Terrain {
    /// A long valley, 25 times as steep across as along.
    Ravine,
    /// Rosenbrock's curved valley (1960).
    Rosenbrock,
    /// Himmelblau's function (1972): four minima, equally deep.
    Himmelblau,
    /// A bowl with fifteen hills and hollows, one of them the deepest.
    Hills,
    /// A pass between two valleys.
    Saddle,
    /// A bowl with pits of five sizes, each half as wide and half as deep as the one before.
    Fractal,
}

/// Height, centre, and the radius within which half of it is, of hills (above zero) and hollows:
/// `height / (1 + |p - centre|^2 / radius^2)^2`.
const HILLS: [[f32; 4]; 15] = [
    [-1.6, 0.5, -0.4, 0.9],
    [-0.7, -1.6, 1.2, 0.6],
    [-0.75, 1.9, 1.4, 0.6],
    [-0.7, -1.3, -1.6, 0.6],
    [-0.6, 2.1, -1.5, 0.5],
    [-0.5, -0.3, 2.2, 0.5],
    [-0.5, -2.4, -0.2, 0.5],
    [-0.5, 0.6, -2.4, 0.45],
    [0.5, -0.6, 0.5, 0.4],
    [0.5, 1.2, 0.5, 0.35],
    [0.45, -0.6, -1.0, 0.4],
    [0.4, 1.5, -0.9, 0.35],
    [0.35, 0.5, 1.0, 0.35],
    [0.4, -1.7, 0.3, 0.4],
    [0.35, 2.5, 0.2, 0.4],
];

/// Cosine and sine of a turn, and an offset, for each size of pits. The turns keep the grids from lining up.
const OCTAVES: [[f32; 4]; 5] = [
    [1.0, 0.0, 0.5, 0.5],
    [0.6, 0.8, 0.3, 0.7],
    [5.0 / 13.0, 12.0 / 13.0, 0.15, 0.4],
    [8.0 / 17.0, 15.0 / 17.0, 0.8, 0.25],
    [0.28, 0.96, 0.55, 0.1],
];

impl Terrain {
    /// The one that is shown first comes first.
    pub const ALL: [Self; 6] = [
        Self::Hills,
        Self::Fractal,
        Self::Ravine,
        Self::Rosenbrock,
        Self::Himmelblau,
        Self::Saddle,
    ];

    /// The name in lower case, as it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ravine => "ravine",
            Self::Rosenbrock => "rosenbrock",
            Self::Himmelblau => "himmelblau",
            Self::Hills => "hills",
            Self::Saddle => "saddle",
            Self::Fractal => "fractal",
        }
    }

    /// The terrain of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|terrain| terrain.name() == name)
    }

    /// The square in which balls start and which is drawn: everywhere at most `half_width` from `centre` in x and in y.
    pub const fn domain(self) -> Domain {
        let (centre, half_width) = match self {
            Self::Ravine | Self::Saddle => ([0.0, 0.0], 2.0),
            Self::Rosenbrock => ([0.0, 1.0], 2.0),
            Self::Himmelblau => ([0.0, 0.0], 5.0),
            Self::Hills | Self::Fractal => ([0.0, 0.0], 3.0),
        };
        Domain { centre, half_width }
    }

    /// A learning rate at which neither plain descent nor momentum flies out of the domain.
    pub const fn lr(self) -> f64 {
        match self {
            Self::Ravine => 0.01,
            Self::Rosenbrock => 2e-4,
            Self::Himmelblau => 1e-3,
            Self::Hills => 0.05,
            Self::Saddle => 0.02,
            Self::Fractal => 0.01,
        }
    }

    /// The deepest points: one, or several that are equally deep.
    pub const fn deepest(self) -> &'static [[f64; 2]] {
        match self {
            Self::Ravine => &[[0.0, 0.0]],
            Self::Rosenbrock => &[[1.0, 1.0]],
            Self::Himmelblau => &[
                [3.0, 2.0],
                [-2.805_118_086_952_745, 3.131_312_518_250_573],
                [-3.779_310_253_377_747, -3.283_185_991_286_17],
                [3.584_428_340_330_492, -1.848_126_526_964_404],
            ],
            Self::Hills => &[[0.485_044_949, -0.389_358_691]],
            Self::Saddle => &[[0.0, 1.0], [0.0, -1.0]],
            Self::Fractal => &[[0.172_908_824, -0.232_090_643]],
        }
    }

    /// The distance from a deepest point within which a ball is in the deepest valley.
    pub const fn valley_radius(self) -> f64 {
        match self {
            Self::Ravine | Self::Saddle => 0.1,
            Self::Rosenbrock | Self::Himmelblau => 0.2,
            Self::Hills | Self::Fractal => 0.35,
        }
    }

    /// The lowest height and the highest that is drawn.
    pub const fn heights(self) -> [f64; 2] {
        match self {
            Self::Ravine => [0.0, 52.0],
            Self::Rosenbrock => [0.0, 2509.0],
            Self::Himmelblau => [0.0, 890.0],
            Self::Hills => [-1.55, 2.16],
            Self::Saddle => [-2.0, 4.0],
            Self::Fractal => [-1.0, 2.5],
        }
    }

    /// The power of its share of the range by which a height is drawn, so that deep valleys in steep terrains show.
    pub const fn exaggeration(self) -> f64 {
        match self {
            Self::Ravine => 0.5,
            Self::Rosenbrock => 0.25,
            Self::Himmelblau => 0.4,
            Self::Hills | Self::Saddle | Self::Fractal => 1.0,
        }
    }

    /// Height above zero, the loss.
    pub fn height<T: Real>(self, x: T, y: T) -> T {
        self.ground(x, y).0
    }

    /// The gradient of the height: the force on a ball is minus it.
    pub fn slope<T: Real>(self, x: T, y: T) -> [T; 2] {
        self.ground(x, y).1
    }

    /// Height and slope.
    fn ground<T: Real>(self, x: T, y: T) -> (T, [T; 2]) {
        let k = <T as From<f32>>::from;
        match self {
            Self::Ravine => (k(0.5) * (x * x + k(25.0) * y * y), [x, k(25.0) * y]),
            Self::Rosenbrock => {
                let (left, above) = (k(1.0) - x, y - x * x);
                (
                    left * left + k(100.0) * above * above,
                    [k(-2.0) * left - k(400.0) * x * above, k(200.0) * above],
                )
            }
            Self::Himmelblau => {
                let a = x * x + y - k(11.0);
                let b = x + y * y - k(7.0);
                (
                    a * a + b * b,
                    [k(4.0) * x * a + k(2.0) * b, k(2.0) * a + k(4.0) * y * b],
                )
            }
            Self::Saddle => (
                k(0.5) * (x * x - y * y) + k(0.25) * y * y * y * y,
                [x, y * y * y - y],
            ),
            Self::Hills => {
                let mut height = k(0.12) * (x * x + y * y);
                let mut slope = [k(0.24) * x, k(0.24) * y];
                for [a, centre_x, centre_y, radius] in HILLS.map(|hill| hill.map(k)) {
                    let (dx, dy) = (x - centre_x, y - centre_y);
                    let narrow = k(1.0) / (radius * radius);
                    let q = k(1.0) / (k(1.0) + (dx * dx + dy * dy) * narrow);
                    height = height + a * q * q;
                    let down = k(-4.0) * a * q * q * q * narrow;
                    slope = [slope[0] + down * dx, slope[1] + down * dy];
                }
                (height, slope)
            }
            Self::Fractal => {
                let mut height = k(0.15) * (x * x + y * y);
                let mut slope = [k(0.3) * x, k(0.3) * y];
                let (mut depth, mut frequency) = (k(0.6), k(0.25));
                for [cos, sin, offset_u, offset_v] in OCTAVES.map(|octave| octave.map(k)) {
                    let (u, du) = pit(frequency * (cos * x - sin * y) + offset_u);
                    let (v, dv) = pit(frequency * (sin * x + cos * y) + offset_v);
                    height = height - depth * u * v;
                    let (along_u, along_v) =
                        (depth * frequency * du * v, depth * frequency * u * dv);
                    slope[0] = slope[0] - (cos * along_u + sin * along_v);
                    slope[1] = slope[1] - (cos * along_v - sin * along_u);
                    depth = depth * k(0.5);
                    frequency = frequency * k(2.0);
                }
                (height, slope)
            }
        }
    }

    /// Whether a point is in a deepest valley: a terrain may have several.
    pub fn is_deepest(self, x: f64, y: f64) -> bool {
        let near = |[a, b]: &[f64; 2]| (x - a).hypot(y - b) < self.valley_radius();
        self.deepest().iter().any(near)
    }

    /// WGSL: `ground(p)`, its height and slope, and what is known of the terrain as constants.
    pub fn wgsl(self) -> String {
        let mut source = String::new();
        let Domain { centre, half_width } = self.domain();
        let [lowest, highest] = self.heights();
        let radius = self.valley_radius() as f32;
        // A String takes everything.
        let _ = writeln!(source, "const TERRAIN = {}u;", self as u32);
        let _ = writeln!(source, "const HILLS = {};", wgsl_array(&HILLS));
        let _ = writeln!(source, "const OCTAVES = {};", wgsl_array(&OCTAVES));
        let _ = writeln!(source, "const DEEPEST = {};", wgsl_array(self.deepest()));
        let _ = writeln!(source, "const DEEPEST_COUNT = {}u;", self.deepest().len());
        let _ = writeln!(
            source,
            "const VALLEY_RADIUS_SQUARED: f32 = {:?};",
            radius * radius
        );
        let _ = writeln!(
            source,
            "const CENTRE = vec2<f32>({:?}, {:?});",
            centre[0], centre[1]
        );
        let _ = writeln!(source, "const HALF_WIDTH: f32 = {half_width:?};");
        let _ = writeln!(source, "const LOWEST: f32 = {lowest:?};");
        let _ = writeln!(source, "const HIGHEST: f32 = {highest:?};");
        let _ = writeln!(
            source,
            "const EXAGGERATION: f32 = {:?};",
            self.exaggeration()
        );
        source + include_str!("../shaders/terrain.wgsl")
    }
}

/// A square.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Domain {
    /// x and y.
    pub centre: [f64; 2],
    /// Half the length of a side.
    pub half_width: f64,
}

/// A smooth wave of period 1 and height 1, zero where `t` is whole, and its slope.
fn pit<T: Real>(t: T) -> (T, T) {
    let k = <T as From<f32>>::from;
    let t = t - t.floor();
    let both = t * (k(1.0) - t);
    (
        k(16.0) * both * both,
        k(32.0) * both * (k(1.0) - k(2.0) * t),
    )
}

/// `array(vec4(..), ..)`: numbers as `f32` prints them read back as the same `f32`.
fn wgsl_array<const N: usize, T: Copy + std::fmt::Debug>(rows: &[[T; N]]) -> String {
    let rows = rows.iter().map(|row| {
        let row: Vec<_> = row.iter().map(|value| format!("{value:?}")).collect();
        format!("vec{N}<f32>({})", row.join(", "))
    });
    format!("array({})", rows.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(terrain: Terrain, per_side: usize) -> impl Iterator<Item = [f64; 2]> {
        let Domain { centre, half_width } = terrain.domain();
        let place = move |index: usize, centre: f64| {
            centre + half_width * (2.0 * index as f64 / (per_side - 1) as f64 - 1.0)
        };
        (0..per_side * per_side).map(move |i| {
            [
                place(i % per_side, centre[0]),
                place(i / per_side, centre[1]),
            ]
        })
    }

    #[test]
    fn slopes_are_those_of_the_heights() {
        for terrain in Terrain::ALL {
            for [x, y] in grid(terrain, 41).map(|[x, y]| [x + 0.003, y - 0.001]) {
                let step = 1e-5;
                let difference = |dx: f64, dy: f64| {
                    let ahead = terrain.height(x + dx * step, y + dy * step);
                    (ahead - terrain.height(x - dx * step, y - dy * step)) / (2.0 * step)
                };
                let slope = terrain.slope(x, y);
                // Central differences are off by a sixth of step^2 times a third derivative, none above 1e4 here, and by
                // some ten roundings of each of two heights over the step.
                let tolerance =
                    step * step * 1e4 / 6.0 + 20.0 * f64::EPSILON * terrain.heights()[1] / step;
                for (exact, [dx, dy]) in slope.into_iter().zip([[1.0, 0.0], [0.0, 1.0]]) {
                    let error = (exact - difference(dx, dy)).abs();
                    assert!(error < tolerance, "{terrain:?} at {x}, {y}: {error}");
                }
            }
        }
    }

    #[test]
    fn nothing_is_deeper_than_the_deepest() {
        for terrain in Terrain::ALL {
            let bottom = terrain.height(terrain.deepest()[0][0], terrain.deepest()[0][1]);
            for [x, y] in terrain.deepest() {
                let [dx, dy] = terrain.slope(*x, *y);
                // Where they stand to nine digits, curvatures of some hundred leave this.
                assert!(
                    dx.hypot(dy) < 1e-5,
                    "{terrain:?} is not level at {x}, {y}: {dx}, {dy}"
                );
                assert!((terrain.height(*x, *y) - bottom).abs() < 1e-9);
            }
            for [x, y] in grid(terrain, 1001) {
                let height = terrain.height(x, y);
                assert!(
                    height >= bottom - 1e-12,
                    "{terrain:?} is deeper at {x}, {y}"
                );
                let [lowest, highest] = terrain.heights();
                assert!(
                    lowest <= height + 0.01 && height <= 1.01 * highest,
                    "{terrain:?}: {height}"
                );
            }
        }
    }
}
