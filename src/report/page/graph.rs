//! The drawing of the graph of stages: from the top down, each stage below what it is made from.
//!
//! Recipes are small and drawn often, so the same graph must give the same picture: rows by the longest way from a source, and
//! within a row stages near the middle of what they are made from.

use std::fmt::Write as _;

use super::Stage;

const WIDTH: usize = 168;
const HEIGHT: usize = 46;
const ACROSS: usize = 22;
const DOWN: usize = 38;

/// Draws the stages as SVG. A stage links to its part of the page, `#stage-<place>`.
pub(super) fn draw(stages: &[Stage]) -> String {
    let rows = rows(stages);
    let widest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = widest * (WIDTH + ACROSS) + ACROSS;
    let height = rows.len() * (HEIGHT + DOWN) + ACROSS;
    let mut corners = vec![(0, 0); stages.len()];
    for (down, row) in rows.iter().enumerate() {
        let taken = row.len() * (WIDTH + ACROSS) - ACROSS;
        let left = (width - taken) / 2;
        for (across, &stage) in row.iter().enumerate() {
            corners[stage] = (
                left + across * (WIDTH + ACROSS),
                ACROSS / 2 + down * (HEIGHT + DOWN),
            );
        }
    }
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         role=\"group\" aria-label=\"Stages and what they are made from\"><defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" \
         refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\"/></marker></defs>\n"
    );
    for (to, stage) in stages.iter().enumerate() {
        let mut from: Vec<usize> = stage.inputs.iter().map(|input| input.1).collect();
        from.sort_unstable();
        from.dedup();
        for from in from {
            let start = (corners[from].0 + WIDTH / 2, corners[from].1 + HEIGHT);
            let end = (corners[to].0 + WIDTH / 2, corners[to].1);
            let bend = DOWN.min(end.1.saturating_sub(start.1)) / 2 + 4;
            _ = writeln!(
                svg,
                "<path d=\"M{} {}C{} {} {} {} {} {}\" marker-end=\"url(#tip)\"/>",
                start.0,
                start.1,
                start.0,
                start.1 + bend,
                end.0,
                end.1 - bend,
                end.0,
                end.1
            );
        }
    }
    for (place, stage) in stages.iter().enumerate() {
        let (x, y) = corners[place];
        let below = match &stage.seconds {
            Some(seconds) => format!("{} · {seconds}", stage.state_label),
            None => stage.state_label.clone(),
        };
        _ = writeln!(
            svg,
            "<a href=\"#stage-{place}\" aria-label=\"{name}, {kind}, {below}\"><g class=\"{state}\"><rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" rx=\"6\"/><text x=\"{left}\" y=\"{first}\">{short}</text><text class=\"small\" x=\"{left}\" \
             y=\"{second}\">{below}</text></g></a>",
            name = escape(&stage.name),
            kind = escape(&stage.kind),
            state = stage.state,
            left = x + 10,
            first = y + 19,
            second = y + 36,
            short = escape(&shortened(&stage.name)),
            below = escape(&below),
        );
    }
    svg.push_str("</svg>");
    svg
}

/// The stages of each row. A stage is below all it is made from.
fn rows(stages: &[Stage]) -> Vec<Vec<usize>> {
    // A recipe has no cycle, so that many rounds are enough.
    let mut depth = vec![0; stages.len()];
    for _ in 0..stages.len() {
        let mut settled = true;
        for (place, stage) in stages.iter().enumerate() {
            let above = stage.inputs.iter().map(|input| depth[input.1] + 1).max();
            let above = above.unwrap_or(0);
            if depth[place] < above && above < stages.len() {
                depth[place] = above;
                settled = false;
            }
        }
        if settled {
            break;
        }
    }
    let count = depth.iter().max().map_or(0, |deepest| deepest + 1);
    let mut rows = vec![Vec::new(); count];
    for (place, depth) in depth.iter().enumerate() {
        rows[*depth].push(place);
    }
    let mut middle = vec![0.; stages.len()];
    for row in &mut rows {
        let wanted = |place: &usize| {
            let inputs = &stages[*place].inputs;
            let sum: f64 = inputs.iter().map(|input| middle[input.1]).sum();
            sum / inputs.len().max(1) as f64
        };
        row.sort_by(|a, b| wanted(a).total_cmp(&wanted(b)));
        let half = (row.len() as f64 - 1.) / 2.;
        for (across, place) in row.iter().enumerate() {
            middle[*place] = across as f64 - half;
        }
    }
    rows
}

fn shortened(name: &str) -> String {
    const LONGEST: usize = 18;
    if name.chars().count() <= LONGEST {
        return name.to_owned();
    }
    let head: String = name.chars().take(LONGEST - 1).collect();
    head + "…"
}

fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}
