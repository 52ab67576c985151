//! The program on a page: `web/index.html` loads it.
//!
//! The address may say what is shown: `?terrain=hills&balls=100000&seed=1&frames=60`, the last of which pauses there. The
//! newest figures stand as JSON in the element `figures`.

use anyhow::{Context as _, Result, anyhow};
use eframe::Location;
use eframe::wasm_bindgen::JsCast as _;
use eframe::web_sys::{self, Document, HtmlCanvasElement};

use crate::app::{self, App};
use crate::settings::Settings;
use crate::terrain::Terrain;

/// The number of balls that a page starts with on each side.
const BALLS: u32 = 100_000;

/// Starts the program in the canvas, or says on the page why not.
pub fn start() {
    // Nobody reads what cannot be logged.
    let _ = eframe::WebLogger::init(log::LevelFilter::Warn);
    wasm_bindgen_futures::spawn_local(async {
        let Some(document) = web_sys::window().and_then(|window| window.document()) else {
            log::error!("no document");
            return;
        };
        let problem = run(&document).await.err();
        let text = problem
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        if let Some(message) = document.get_element_by_id("message") {
            message.set_text_content(Some(&text));
        }
    });
}

async fn run(document: &Document) -> Result<()> {
    let element = |id: &str| {
        let found = document.get_element_by_id(id);
        found.with_context(|| format!("the page has no element {id}"))
    };
    let canvas = element("landscape")?.dyn_into::<HtmlCanvasElement>();
    let canvas = canvas.map_err(|_| anyhow!("the element landscape is no canvas"))?;
    let figures = element("figures")?;
    let options = eframe::WebOptions {
        wgpu_options: app::wgpu_options(None),
        ..Default::default()
    };
    let message = element("message")?;
    let create: eframe::AppCreator<'static> = Box::new(move |context| {
        let (settings, frames) = asked(&context.integration_info.web_info.location)?;
        if let Some(engine) = &context.wgpu_render_state {
            engine.device.set_device_lost_callback(move |_, reason| {
                let text = format!("The browser has taken the GPU away. {reason}");
                message.set_text_content(Some(&text));
            });
        }
        let app = App::new(context, settings)?.with_steps(1, frames);
        Ok(Box::new(app.telling(move |frame| {
            // Numbers and strings only.
            let text = serde_json::to_string(frame).unwrap_or_default();
            figures.set_text_content(Some(&text));
        })))
    });
    let started = eframe::WebRunner::new()
        .start(canvas, options, create)
        .await;
    started.map_err(|error| {
        let reason = error.as_string().unwrap_or_else(|| format!("{error:?}"));
        anyhow!("This page needs WebGPU, which did not start here: {reason}")
    })
}

/// Reads the settings and the number of steps from the page's address.
fn asked(location: &Location) -> Result<(Settings, Option<u64>)> {
    let value = |name: &str| {
        location
            .query_map
            .get(name)
            .and_then(|values| values.first())
    };
    let terrain = match value("terrain") {
        Some(name) => Terrain::named(name).with_context(|| format!("no terrain {name}"))?,
        None => Terrain::Hills,
    };
    let number = |name: &str| -> Result<Option<u64>> {
        let text = value(name);
        let number = text.map(|text| text.parse().with_context(|| format!("{name}={text}")));
        number.transpose()
    };
    let balls = number("balls")?.unwrap_or(u64::from(BALLS));
    let balls = u32::try_from(balls).with_context(|| format!("balls={balls}"))?;
    let seed = number("seed")?.unwrap_or(1);
    Ok((Settings::new(terrain, balls, seed), number("frames")?))
}
