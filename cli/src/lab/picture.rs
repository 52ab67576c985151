//! Curves on paper: one look for all pictures.
//!
//! White paper and dark ink are painted, not left to the viewer. The colours are those of Okabe and Ito, *Color
//! Universal Design*, 2008, which colour-blind readers can tell apart.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
#[doc(no_inline)]
pub use plotters::style::RGBColor;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use resvg::{tiny_skia, usvg};

/// The color of text and axes.
pub const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
/// The color of lines in the background.
pub const GREY: RGBColor = RGBColor(0x99, 0x99, 0x99);
/// Orange.
pub const ORANGE: RGBColor = RGBColor(0xE6, 0x9F, 0x00);
/// Sky blue.
pub const SKY_BLUE: RGBColor = RGBColor(0x56, 0xB4, 0xE9);
/// Bluish green.
pub const GREEN: RGBColor = RGBColor(0x00, 0x9E, 0x73);
/// Blue.
pub const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xB2);
/// Vermilion.
pub const VERMILION: RGBColor = RGBColor(0xD5, 0x5E, 0x00);
/// Reddish purple.
pub const PINK: RGBColor = RGBColor(0xCC, 0x79, 0xA7);
/// The colors of curves that have none of their own, the ones first that are furthest apart.
pub const COLORS: [RGBColor; 6] = [BLUE, VERMILION, GREEN, ORANGE, SKY_BLUE, PINK];

const SIZE: (u32, u32) = (960, 600);
/// plotters draws on whole pixels, which makes stairs of a flat curve: each is so many in the drawing.
const FINE: i32 = 8;
/// Pixels of a PNG per pixel of its SVG.
const PNG_SCALE: f32 = 2.0;
// plotters writes fonts at 1/1.24 of the size that it is asked for: these are 19 and 15 pixels.
const TITLE: i32 = 24;
const TITLE_AREA: i32 = 44;
const TEXT: i32 = 18;
const LEGEND_LINE: i32 = 26;
const LEGEND_COLUMNS: usize = 2;

/// The look of a curve, with its width or radius in pixels.
#[derive(Clone, Copy)]
pub enum Stroke {
    /// A line.
    Solid(u32),
    /// A line of dashes.
    Dashed(u32),
    /// A dot at each point.
    Dots(u32),
    /// A solid line with a dot at each point.
    Dotted(u32),
}

/// Points and how they are drawn.
pub struct Curve {
    /// Empty for one that the legend leaves out.
    pub label: String,
    /// The color of the stroke.
    pub color: RGBColor,
    /// The stroke of the curve and of its sample in the legend.
    pub stroke: Stroke,
    /// The points, in the units of the axes.
    pub points: Vec<(f64, f64)>,
}

/// The side of a point on which its note stands clear of the curves.
#[derive(Clone, Copy)]
pub enum Side {
    /// To its right.
    Right,
    /// Under it.
    Below,
}

/// A ring around a point, and what is to be said about it.
pub struct Note {
    /// The words; may be empty.
    pub text: String,
    /// The point.
    pub at: (f64, f64),
    /// The side of the point on which the text stands.
    pub side: Side,
    /// The color of ring and text.
    pub color: RGBColor,
}

/// The scale of an axis.
#[derive(Clone, Copy)]
pub enum Axis {
    /// Numbers.
    Linear,
    /// Logarithms to base ten.
    PowersOfTen,
    /// Logarithms to base two, of numbers.
    PowersOfTwo,
}

impl Axis {
    fn tick(self, position: f64) -> String {
        match self {
            // Ticks are multiples, which `f64` may miss by a little.
            Self::Linear => format!("{}", (position * 1e9).round() / 1e9),
            Self::PowersOfTen if position.fract() == 0.0 && (-3.0..4.0).contains(&position) => {
                format!("{}", 10_f64.powf(position))
            }
            Self::PowersOfTen if position.fract() == 0.0 => format!("1e{position:.0}"),
            Self::PowersOfTen => format!("{:.2}", 10_f64.powf(position)),
            Self::PowersOfTwo => {
                let (unit, shift) = match position {
                    30.0.. => ("G", 30.0),
                    20.0.. => ("M", 20.0),
                    10.0.. => ("K", 10.0),
                    _ => ("", 0.0),
                };
                format!("{:.0}{unit}", (position - shift).exp2())
            }
        }
    }

    /// The number of steps of one in a logarithmic range, and so of ticks; else about eight.
    fn ticks(self, range: &Range<f64>) -> usize {
        match self {
            Self::Linear => 8,
            Self::PowersOfTen | Self::PowersOfTwo => {
                ((range.end - range.start).ceil() as usize).clamp(2, 12)
            }
        }
    }
}

/// Curves over two axes, with a legend below.
pub struct Picture {
    /// Above it.
    pub title: String,
    /// Below the horizontal axis.
    pub x_label: &'static str,
    /// Beside the vertical axis.
    pub y_label: &'static str,
    /// The axis from left to right.
    pub x: Range<f64>,
    /// The axis from bottom to top.
    pub y: Range<f64>,
    /// The label of `x`.
    pub x_axis: Axis,
    /// The label of `y`.
    pub y_axis: Axis,
    /// The later over the earlier.
    pub curves: Vec<Curve>,
    /// Over all curves.
    pub notes: Vec<Note>,
}

/// Pictures in rows of so many, as SVG.
///
/// # Errors
/// If the drawing fails.
pub fn sheet(columns: usize, pictures: &[Picture]) -> Result<String> {
    let mut svg = String::new();
    let rows = pictures.len().div_ceil(columns).max(1);
    {
        let size = (fine(SIZE.0) * columns as u32, fine(SIZE.1) * rows as u32);
        let paper = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        paper.fill(&WHITE)?;
        // Where several stand side by side they are looked at from farther away.
        let zoom = f64::from(FINE) * if columns > 1 { 1.4 } else { 1.0 };
        for (picture, area) in pictures.iter().zip(paper.split_evenly((rows, columns))) {
            picture.draw(&area, zoom)?;
        }
        paper.present()?;
    }
    // As large as it is meant, whatever it is drawn in.
    let fine = |columns: usize, size| fine(size) * columns as u32;
    let drawn = format!(
        r#"<svg width="{}" height="{}" "#,
        fine(columns, SIZE.0),
        fine(rows, SIZE.1)
    );
    let meant = format!(
        r#"<svg width="{}" height="{}" "#,
        SIZE.0 * columns as u32,
        SIZE.1 * rows as u32
    );
    Ok(svg.replacen(&drawn, &meant, 1))
}

/// An SVG that this module has made as a PNG, with a font of its own: a machine need not have any.
///
/// # Errors
/// If it is no SVG, or of no size.
pub fn to_png(svg: &str) -> Result<Vec<u8>> {
    let mut options = usvg::Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    fonts.set_sans_serif_family("Ubuntu");
    let tree = usvg::Tree::from_str(svg, &options)?;
    let zoom = tiny_skia::Transform::from_scale(PNG_SCALE, PNG_SCALE);
    let size = tree.size().to_int_size();
    let size = size.scale_by(PNG_SCALE).unwrap_or(size);
    let mut pixels = tiny_skia::Pixmap::new(size.width(), size.height())
        .ok_or_else(|| anyhow!("a picture of no size"))?;
    resvg::render(&tree, zoom, &mut pixels.as_mut());
    Ok(pixels.encode_png()?)
}

impl Picture {
    fn draw(&self, paper: &DrawingArea<SVGBackend<'_>, Shift>, zoom: f64) -> Result<()> {
        // The legend has its own strip at the bottom, where no data can be.
        let line = zoomed(LEGEND_LINE, zoom);
        let legend_height = match self.legend_rows() {
            0 => 0,
            rows => line * rows as i32 + line / 2,
        };
        let (chart, legend) = paper.split_vertically(fine(SIZE.1) as i32 - legend_height);
        self.draw_chart(&chart, zoom)?;
        self.draw_legend(&legend, zoom)
    }

    fn draw_chart(&self, area: &DrawingArea<SVGBackend<'_>, Shift>, zoom: f64) -> Result<()> {
        let font = |size| font(zoomed(size, zoom));
        let (heading, area) = area.split_vertically(zoomed(TITLE_AREA, zoom));
        let middle = Pos::new(HPos::Center, VPos::Center);
        let (width, height) = heading.dim_in_pixel();
        let at = (width as i32 / 2, height as i32 / 2);
        heading.draw(&Text::new(self.title.as_str(), at, font(TITLE).pos(middle)))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12 * FINE)
            .margin_top(0)
            .margin_right(30 * FINE)
            .x_label_area_size(zoomed(55, zoom))
            .y_label_area_size(zoomed(85, zoom))
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .x_labels(self.x_axis.ticks(&self.x))
            .y_labels(self.y_axis.ticks(&self.y))
            .x_label_formatter(&|x| self.x_axis.tick(*x))
            .y_label_formatter(&|y| self.y_axis.tick(*y))
            .label_style(font(TEXT))
            .axis_desc_style(font(TEXT))
            .set_all_tick_mark_size(5 * FINE)
            .axis_style(INK.stroke_width(fine(1)))
            .bold_line_style(RGBColor(0xDD, 0xDD, 0xDD).stroke_width(fine(1)))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for curve in &self.curves {
            let points = curve.points.iter().copied();
            match curve.stroke {
                Stroke::Solid(width) => {
                    let style = curve.color.stroke_width(fine(width));
                    chart.draw_series(LineSeries::new(points, style))?;
                }
                Stroke::Dashed(width) => {
                    let style = curve.color.stroke_width(fine(width));
                    chart.draw_series(DashedLineSeries::new(points, fine(9), fine(6), style))?;
                }
                Stroke::Dots(radius) => {
                    let dot = |at| Circle::new(at, fine(radius), curve.color.filled());
                    chart.draw_series(points.map(dot))?;
                }
                Stroke::Dotted(width) => {
                    let style = curve.color.stroke_width(fine(width));
                    let dots = LineSeries::new(points, style).point_size(2 * fine(width));
                    chart.draw_series(dots)?;
                }
            }
        }
        chart.draw_series(self.notes.iter().map(|note| {
            let (offset, position) = match note.side {
                Side::Right => ((18 * FINE, 0), Pos::new(HPos::Left, VPos::Center)),
                Side::Below => ((0, 18 * FINE), Pos::new(HPos::Center, VPos::Top)),
            };
            let style = font(TEXT).color(&note.color).pos(position);
            EmptyElement::at(note.at)
                + Circle::new((0, 0), 9 * FINE, note.color.stroke_width(fine(2)))
                + Text::new(note.text.clone(), offset, style)
        }))?;
        Ok(())
    }

    /// The curves that are explained.
    fn labelled(&self) -> impl Iterator<Item = &Curve> {
        self.curves.iter().filter(|curve| !curve.label.is_empty())
    }

    fn legend_rows(&self) -> usize {
        self.labelled().count().div_ceil(LEGEND_COLUMNS)
    }

    fn draw_legend(&self, area: &DrawingArea<SVGBackend<'_>, Shift>, zoom: f64) -> Result<()> {
        let (font, line) = (|size| font(zoomed(size, zoom)), zoomed(LEGEND_LINE, zoom));
        let column_width = fine(SIZE.0) as i32 / LEGEND_COLUMNS as i32;
        let beside = Pos::new(HPos::Left, VPos::Center);
        for (index, curve) in self.labelled().enumerate() {
            let (column, row) = (index / self.legend_rows(), index % self.legend_rows());
            let x = 16 * FINE + column_width * column as i32;
            let y = line * row as i32 + line / 2;
            let sample = [(x, y), (x + 39 * FINE, y)];
            match curve.stroke {
                Stroke::Solid(width) | Stroke::Dotted(width) => {
                    area.draw(&PathElement::new(
                        sample,
                        curve.color.stroke_width(fine(width)),
                    ))?;
                }
                Stroke::Dashed(width) => {
                    let style = curve.color.stroke_width(fine(width));
                    area.draw(&DashedPathElement::new(sample, fine(9), fine(6), style))?;
                }
                Stroke::Dots(radius) => {
                    area.draw(&Circle::new(
                        (x + 20 * FINE, y),
                        fine(radius),
                        curve.color.filled(),
                    ))?;
                }
            }
            let style = font(TEXT).pos(beside);
            area.draw(&Text::new(curve.label.as_str(), (x + 50 * FINE, y), style))?;
        }
        Ok(())
    }
}

/// Pixels of the drawing for so many of the picture.
fn fine(pixels: u32) -> u32 {
    pixels * FINE as u32
}

fn zoomed(size: i32, zoom: f64) -> i32 {
    (f64::from(size) * zoom) as i32
}

fn font<'a>(size: i32) -> TextStyle<'a> {
    ("sans-serif", size).into_font().color(&INK)
}
