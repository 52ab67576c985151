//! `landscape` opens a window, `landscape --headless` writes pictures, and on wasm32 it is the page's program.

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use std::path::PathBuf;

    use anyhow::{Result, anyhow, ensure};
    use clap::Parser;
    use landscape::app::{self, App};
    use landscape::headless::{self, Recording};
    use landscape::settings::{RuleSettings, Settings};
    use landscape::terrain::Terrain;

    /// A million balls on hilly terrain, two rules side by side.
    #[derive(Debug, Parser)]
    struct Args {
        /// hills, fractal, ravine, rosenbrock, himmelblau or saddle
        #[arg(long, default_value = "hills", value_parser = terrain)]
        terrain: Terrain,
        /// Number of balls on each side
        #[arg(long, default_value_t = 1_000_000)]
        balls: u32,
        /// Seed of the places where balls start
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Rules of the left and the right side: sgd, adam, lion or any other rule of `wgpu-optim`
        #[arg(long, num_args = 2, value_delimiter = ',', default_values = ["sgd", "sgd"], value_parser = rule_name)]
        rules: Vec<&'static str>,
        /// Momentum of the left and the right side, for sgd
        #[arg(long, num_args = 2, value_delimiter = ',', default_values_t = [0.0, 0.9])]
        momentum: Vec<f64>,
        /// Learning rates of the left and the right side; the terrain's own by default
        #[arg(long, num_args = 2, value_delimiter = ',')]
        lr: Vec<f64>,
        #[arg(long, default_value_t = 1)]
        steps_per_frame: u32,
        /// Open no window, but write pictures, an animation and the figures
        #[arg(long, requires = "out")]
        headless: bool,
        /// Number of frames; without `--headless` the window pauses there
        #[arg(long)]
        frames: Option<u32>,
        /// Directory for the pictures
        #[arg(long, value_name = "DIR", requires = "headless")]
        out: Option<PathBuf>,
        /// Frames from one picture to the next
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
        every: u32,
        /// Size of a picture in pixels: width, height
        #[arg(long, num_args = 2, value_delimiter = ',', default_values_t = [1280, 640])]
        size: Vec<u32>,
        /// Text in the adapter's name
        #[arg(long)]
        adapter: Option<String>,
    }

    fn terrain(name: &str) -> Result<Terrain> {
        Terrain::named(name).ok_or_else(|| anyhow!("no such terrain"))
    }

    fn rule_name(name: &str) -> Result<&'static str> {
        let names = RuleSettings::names();
        let found = names.iter().find(|known| **known == name);
        found
            .copied()
            .ok_or_else(|| anyhow!("one of {}", names.join(", ")))
    }

    impl Args {
        fn settings(&self) -> Result<Settings> {
            let mut settings = Settings::new(self.terrain, self.balls, self.seed);
            for (side, rule) in settings.rules.iter_mut().enumerate() {
                rule.rule = self.rules[side];
                rule.momentum = self.momentum[side];
                if let Some(lr) = self.lr.get(side) {
                    rule.lr = *lr;
                }
                rule.config()?;
            }
            Ok(settings)
        }
    }

    pub fn main() -> Result<()> {
        let args = Args::parse();
        let settings = args.settings()?;
        if args.headless {
            ensure!(
                args.size.iter().all(|pixels| (64..=8192).contains(pixels)),
                "a picture has 64 to 8192 pixels a side"
            );
            let recording = Recording {
                frames: args.frames.unwrap_or(300),
                steps_per_frame: args.steps_per_frame,
                every: args.every,
                size: [args.size[0], args.size[1]],
                out: args.out.unwrap_or_default(),
                adapter: args.adapter,
            };
            headless::record(&settings, &recording)?;
            return Ok(());
        }
        let options = eframe::NativeOptions {
            viewport: eframe::egui::ViewportBuilder::default()
                .with_title("Balls on a landscape")
                .with_inner_size([1280.0, 660.0]),
            wgpu_options: app::wgpu_options(args.adapter),
            ..Default::default()
        };
        let stop = args
            .frames
            .map(|frames| u64::from(frames) * u64::from(args.steps_per_frame));
        let steps_per_frame = args.steps_per_frame;
        let create: eframe::AppCreator<'_> = Box::new(move |context| {
            Ok(Box::new(
                App::new(context, settings)?.with_steps(steps_per_frame, stop),
            ))
        });
        eframe::run_native("landscape", options, create).map_err(|error| anyhow!("{error}"))
    }
}

#[cfg(not(target_arch = "wasm32"))]
fn main() -> anyhow::Result<()> {
    native::main()
}

#[cfg(target_arch = "wasm32")]
fn main() {
    landscape::page::start();
}
