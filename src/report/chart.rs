//! Charts of numbers by step, and histograms, as SVG or PNG. They are drawn by plotters.
//!
//! The colours of an SVG are those of [`COLORS`], so that a page can put others in their places.

use std::sync::OnceLock;

use anyhow::{Context as _, anyhow};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

/// Lines, by their index in a chart: the first stands out, further ones are beside it.
pub const COLORS: [RGBColor; 6] = [
    RGBColor(0x0B, 0x5F, 0xD0),
    RGBColor(0xB4, 0x3C, 0x0A),
    RGBColor(0x0A, 0x7D, 0x5E),
    RGBColor(0x8A, 0x4F, 0xB8),
    RGBColor(0x8F, 0x5B, 0x0F),
    RGBColor(0x6A, 0x70, 0x79),
];
/// Labels.
pub(super) const INK: RGBColor = RGBColor(0x44, 0x4C, 0x56);
/// The lines behind.
pub(super) const GRID: RGBColor = RGBColor(0xE1, 0xE4, 0xE8);

/// Pixels are whole numbers to plotters: an SVG is drawn larger and shown smaller, so that lines are smooth.
const FINE: u32 = 3;
/// The most points of a line; of more, the smallest and the largest of each stretch are drawn.
const MOST_POINTS: usize = 1200;

/// How a line is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// A line.
    Line,
    /// A line with a mark at each point, for few points.
    Marks,
    /// A thin line that stays in the background.
    Thin,
}

/// A line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What it shows.
    pub name: String,
    /// The index of its colour in [`COLORS`].
    pub color: usize,
    /// How it is drawn.
    pub look: Look,
    /// Where it goes, by rising x. What is not finite leaves a gap.
    pub points: Vec<(f64, f64)>,
}

/// What a chart shows.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Lines over steps.
    Lines(Vec<Series>),
    /// Bars: where each begins and ends, and its height.
    Bars(Vec<(f64, f64, u64)>),
}

/// A chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// What stands above it; an empty one takes no room.
    pub title: String,
    /// What the horizontal axis counts.
    pub x_label: String,
    /// What it shows.
    pub content: Content,
}

/// A drawn chart, and where its values are in it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Drawn {
    /// The text of the SVG.
    pub svg: String,
    /// The left and right end of the horizontal axis, in the SVG's own units.
    pub x_pixels: (i32, i32),
    /// The upper and lower end of the vertical axis, in the SVG's own units.
    pub y_pixels: (i32, i32),
    /// The values at the ends of the horizontal axis.
    pub x_values: (f64, f64),
    /// The values at the lower and the upper end of the vertical axis.
    pub y_values: (f64, f64),
}

/// The width and height of a chart in a page, in pixels of the page.
const SIZE: (u32, u32) = (420, 236);

/// A chart for a page: without a background or title.
///
/// # Errors
/// Plotters fails, which it has no reason to.
pub fn svg(chart: &Chart) -> anyhow::Result<Drawn> {
    let mut text = String::new();
    let size = (SIZE.0 * FINE, SIZE.1 * FINE);
    let (pixels, values) = {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let drawn = draw(&area, chart, FINE)?;
        area.present().map_err(|error| anyhow!("{error}"))?;
        drawn
    };
    Ok(Drawn {
        svg: text,
        x_pixels: pixels.0,
        y_pixels: pixels.1,
        x_values: values.0,
        y_values: values.1,
    })
}

/// The kinds of pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lines and text.
    Svg,
    /// Pixels.
    Png,
}

/// Charts below and beside each other on a white background, with their titles and one legend for all.
///
/// # Errors
/// There is no chart, or plotters fails.
pub fn picture(
    charts: &[Chart],
    legend: &[(String, usize)],
    format: Format,
) -> anyhow::Result<Vec<u8>> {
    let columns = match charts.len() {
        0 => return Err(anyhow!("there is nothing to draw")),
        1 => 1,
        2..=4 => 2,
        _ => 3,
    };
    let rows = charts.len().div_ceil(columns);
    let head = 12 + 20 * legend.len() as u32;
    let (width, height) = (SIZE.0 * columns as u32, (SIZE.1 + 24) * rows as u32 + head);
    match format {
        Format::Svg => {
            let mut text = String::new();
            {
                let size = (width * FINE, height * FINE);
                let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
                draw_all(&area, charts, legend, (rows, columns), FINE)?;
                area.present().map_err(|error| anyhow!("{error}"))?;
            }
            Ok(text.into_bytes())
        }
        Format::Png => {
            // Twice as fine as the page, for dense screens.
            let (width, height) = (width * 2, height * 2);
            let mut pixels = vec![0; (width * height * 3) as usize];
            {
                let size = (width, height);
                let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
                draw_all(&area, charts, legend, (rows, columns), 2)?;
                area.present().map_err(|error| anyhow!("{error}"))?;
            }
            let mut file = Vec::new();
            let mut encoder = png::Encoder::new(&mut file, width, height);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            let mut writer = encoder.write_header()?;
            writer.write_image_data(&pixels)?;
            writer.finish()?;
            Ok(file)
        }
    }
}

fn draw_all<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    charts: &[Chart],
    legend: &[(String, usize)],
    (rows, columns): (usize, usize),
    scale: u32,
) -> anyhow::Result<()> {
    let failed = |error: DrawingAreaErrorKind<DB::ErrorType>| anyhow!("{error}");
    font()?;
    area.fill(&WHITE).map_err(failed)?;
    let scale = scale as i32;
    let (head, below) = area.split_vertically((12 + 20 * legend.len() as i32) * scale);
    for (line, (name, color)) in legend.iter().enumerate() {
        let y = (16 + 20 * line as i32) * scale;
        let style = color_of(*color).stroke_width(3 * scale as u32);
        let mark = PathElement::new(vec![(12 * scale, y), (36 * scale, y)], style);
        head.draw(&mark).map_err(failed)?;
        let font = ("sans-serif", 15 * scale).into_font().color(&INK);
        let text = Text::new(name.clone(), (44 * scale, y - 8 * scale), font);
        head.draw(&text).map_err(failed)?;
    }
    for (area, chart) in below.split_evenly((rows, columns)).iter().zip(charts) {
        let font = ("sans-serif", 16 * scale).into_font().color(&INK);
        let area = area.titled(&chart.title, font).map_err(failed)?;
        draw(&area, chart, scale as u32)?;
    }
    Ok(())
}

type Range = (f64, f64);
type Ends = ((i32, i32), (i32, i32));

/// Draws a chart; gives the pixels where its axes begin and end, and the values there.
fn draw<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    chart: &Chart,
    scale: u32,
) -> anyhow::Result<(Ends, (Range, Range))> {
    let failed = |error: DrawingAreaErrorKind<DB::ErrorType>| anyhow!("{error}");
    font()?;
    let (x, y) = ranges(&chart.content);
    let font = ("sans-serif", 15 * scale).into_font().color(&INK);
    let mut context = ChartBuilder::on(area)
        .margin(6 * scale)
        .margin_right(16 * scale)
        .x_label_area_size(if chart.x_label.is_empty() { 26 } else { 40 } * scale)
        .y_label_area_size(62 * scale)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)
        .map_err(failed)?;
    let step_of = |range: Range, labels: f64| (range.1 - range.0) / labels;
    let (x_step, y_step) = (step_of(x, 5.), step_of(y, 5.));
    context
        .configure_mesh()
        .x_labels(6)
        .y_labels(5)
        .x_max_light_lines(1)
        .y_max_light_lines(1)
        .disable_x_mesh()
        .bold_line_style(GRID.stroke_width(scale))
        .light_line_style(GRID.stroke_width(scale))
        .axis_style(GRID.stroke_width(scale))
        .label_style(font.clone())
        .axis_desc_style(font)
        .x_desc(chart.x_label.clone())
        .x_label_formatter(&|value| tick(*value, x_step))
        .y_label_formatter(&|value| tick(*value, y_step))
        .draw()
        .map_err(failed)?;
    match &chart.content {
        Content::Lines(series) => {
            // What stands out is drawn last, over the others.
            for line in series.iter().rev() {
                lines(&mut context, line, scale).map_err(failed)?;
            }
        }
        Content::Bars(bars) => {
            let drawn = bars
                .iter()
                .filter(|bar| bar.2 > 0)
                .map(|(from, to, count)| {
                    let corners = [(*from, 0.), (*to, *count as f64)];
                    let mut bar = Rectangle::new(corners, COLORS[0].filled());
                    bar.set_margin(0, 0, scale, 0);
                    bar
                });
            context.draw_series(drawn).map_err(failed)?;
        }
    }
    let (x_pixels, y_pixels) = context.plotting_area().get_pixel_range();
    let ends = (
        (x_pixels.start, x_pixels.end),
        (y_pixels.start, y_pixels.end),
    );
    Ok((ends, (x, y)))
}

type Plane<'a, DB> = ChartContext<'a, DB, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn lines<DB: DrawingBackend>(
    context: &mut Plane<'_, DB>,
    series: &Series,
    scale: u32,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let color = color_of(series.color);
    let style = match series.look {
        Look::Line | Look::Marks => color.stroke_width(2 * scale),
        Look::Thin => color.stroke_width(scale),
    };
    let points = thinned(&series.points);
    let stretches = points.split(|(x, y)| !x.is_finite() || !y.is_finite());
    for stretch in stretches.filter(|stretch| !stretch.is_empty()) {
        context.draw_series(LineSeries::new(stretch.iter().copied(), style))?;
        // A stretch of one point would not be seen as a line.
        if series.look == Look::Marks || stretch.len() == 1 {
            let marks = stretch.iter();
            context
                .draw_series(marks.map(|point| Circle::new(*point, 3 * scale, color.filled())))?;
        }
    }
    Ok(())
}

/// The points of a line, or of a long one those that decide how it looks: the ends and the extremes of each stretch.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MOST_POINTS / 2);
    let mut kept = Vec::with_capacity(MOST_POINTS + 2);
    for points in points.chunks(stretch) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let lowest = points.iter().min_by(by_value);
        let highest = points.iter().max_by(by_value);
        let mut both: Vec<(f64, f64)> = lowest.into_iter().chain(highest).copied().collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        both.dedup();
        kept.extend(both);
    }
    kept
}

fn color_of(index: usize) -> RGBColor {
    COLORS[index % COLORS.len()]
}

/// The values that the axes show.
fn ranges(content: &Content) -> (Range, Range) {
    let (xs, ys): (Vec<f64>, Vec<f64>) = match content {
        Content::Lines(series) => {
            let points = series.iter().flat_map(|series| &series.points);
            points
                .filter(|(x, y)| x.is_finite() && y.is_finite())
                .copied()
                .unzip()
        }
        Content::Bars(bars) => {
            let ends = bars
                .iter()
                .flat_map(|(from, to, count)| [(*from, 0.), (*to, *count as f64)]);
            ends.unzip()
        }
    };
    let x = span(&xs, 0.);
    let y = match content {
        Content::Lines(_) => span(&ys, 0.06),
        Content::Bars(_) => (0., span(&ys, 0.).1 * 1.05),
    };
    (x, y)
}

/// From the smallest to the largest value, with some room at both ends; never empty.
fn span(values: &[f64], room: f64) -> Range {
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if lowest > highest {
        return (0., 1.);
    }
    let width = highest - lowest;
    // Far below what the numbers can tell apart, or beyond what they can hold.
    if !width.is_finite() {
        return (lowest / 2., highest / 2.);
    }
    if width <= lowest.abs().max(highest.abs()) * 1e-9 {
        let around = if highest == 0. {
            1.
        } else {
            highest.abs() / 2.
        };
        return (lowest - around, highest + around);
    }
    (lowest - width * room, highest + width * room)
}

/// A number at an axis whose labels lie `step` apart.
fn tick(value: f64, step: f64) -> String {
    let value = if value.abs() < step.abs() * 1e-6 {
        0.
    } else {
        value
    };
    if value != 0. && (value.abs() >= 1e5 || step.abs() < 1e-4) {
        let text = format!("{value:.1e}");
        return text.replace(".0e", "e");
    }
    let digits = (-step.abs().log10()).ceil().clamp(0., 6.) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// Plotters' font, for how wide text is and for pixels.
fn font() -> anyhow::Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = REGISTERED.get_or_init(|| {
        let font = epaint_default_fonts::UBUNTU_LIGHT;
        register_font("sans-serif", FontStyle::Normal, font).is_ok()
    });
    registered
        .then_some(())
        .context("the font of charts can't be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: Vec<(f64, f64)>) -> Chart {
        let series = Series {
            name: "a".into(),
            color: 0,
            look: Look::Line,
            points,
        };
        Chart {
            title: "<b>&loss".into(),
            x_label: "step".into(),
            content: Content::Lines(vec![series]),
        }
    }

    #[test]
    fn whatever_the_numbers_a_chart_is_drawn() {
        let all = [
            vec![],
            vec![(1., 2.)],
            vec![(1., f64::NAN), (2., f64::INFINITY)],
            vec![(1., 0.), (2., 0.)],
            vec![(1., f64::MAX), (2., f64::MIN)],
            vec![(1., 1e300), (2., -1e300), (3., f64::NAN), (4., 5e-324)],
            (0..100_000).map(|x| (f64::from(x), 1e-6)).collect(),
        ];
        for points in all {
            let chart = line(points.clone());
            let drawn = svg(&chart).unwrap();
            assert!(drawn.svg.starts_with("<svg"), "{points:?}");
            assert!(drawn.svg.len() < 100_000);
            let picture = picture(&[chart], &[("a".into(), 0)], Format::Png).unwrap();
            assert_eq!(&picture[1..4], b"PNG");
        }
        let bars = Chart {
            content: Content::Bars(vec![(0., 10., 3), (10., 20., 0)]),
            ..line(Vec::new())
        };
        assert!(svg(&bars).unwrap().svg.contains("<rect"));
    }

    #[test]
    fn text_in_a_picture_is_text() {
        let legend = [("<script>alert(1)</script>".to_owned(), 0)];
        let text = picture(&[line(vec![(1., 2.)])], &legend, Format::Svg).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("&lt;b&gt;&amp;loss"), "{text}");
        assert!(!text.contains("<script"));
    }

    #[test]
    fn a_long_line_keeps_its_extremes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|x| (f64::from(x), 0.)).collect();
        points[5_001].1 = 9.;
        points[7_777].1 = -4.;
        let kept = thinned(&points);
        assert!(kept.len() <= MOST_POINTS + 2);
        assert!(kept.contains(&(5_001., 9.)) && kept.contains(&(7_777., -4.)));
        assert!(kept.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!(tick(0.1 + 0.2, 0.1), "0.3");
        assert_eq!(tick(8e-6, 2e-6), "8e-6");
        assert_eq!(tick(1200., 200.), "1200");
        assert_eq!(tick(1e-19, 0.5), "0");
        assert_eq!(tick(250_000., 50_000.), "2.5e5");
    }
}
