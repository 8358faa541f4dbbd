//! The drawing of the graph of stages: from the top down, each stage below what it is made from (Sugiyama, Tagawa and Toda 1981, "Methods
//! for visual understanding of hierarchical system structures").
//!
//! The same graph gives the same picture: rows by the longest way from a source, and within a row stages and the lines that pass by them
//! near the middle of what they come from.

use std::fmt::Write as _;

use super::Stage;

const WIDTH: usize = 168;
const HEIGHT: usize = 46;
/// The width of a line that passes by.
const LANE: usize = 14;
const ACROSS: usize = 18;
const DOWN: usize = 38;

/// What stands in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    /// The stage at this index.
    Stage(usize),
    /// The edge at this index, on its way to a lower row.
    Lane(usize),
}

impl Item {
    fn width(self) -> usize {
        match self {
            Self::Stage(_) => WIDTH,
            Self::Lane(_) => LANE,
        }
    }
}

/// A stage that is made from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Edge {
    from: usize,
    to: usize,
}

/// Draws the stages as SVG. A stage links to its part of the page, `#stage-<index>`.
pub(super) fn draw(stages: &[Stage]) -> String {
    let edges = edges(stages);
    let depth = depths(stages);
    let rows = rows(stages.len(), &edges, &depth);
    let row_width = |row: &Vec<Item>| {
        let widths: usize = row.iter().map(|item| item.width() + ACROSS).sum();
        widths.saturating_sub(ACROSS)
    };
    let width = rows.iter().map(row_width).max().unwrap_or(0) + 2 * ACROSS;
    let height = rows.len() * (HEIGHT + DOWN) + ACROSS;
    // The middle of each stage, and of each edge in the rows that it passes.
    let mut middles = vec![0; stages.len()];
    let mut ways: Vec<Vec<usize>> = vec![Vec::new(); edges.len()];
    for row in &rows {
        let mut left = (width - row_width(row)) / 2;
        for item in row {
            let middle = left + item.width() / 2;
            match *item {
                Item::Stage(stage) => middles[stage] = middle,
                Item::Lane(edge) => ways[edge].push(middle),
            }
            left += item.width() + ACROSS;
        }
    }
    let top = |row: usize| ACROSS / 2 + row * (HEIGHT + DOWN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         role=\"group\" aria-label=\"Stages and what they are made from\"><defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" \
         refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\"/></marker></defs>\n"
    );
    for (edge, way) in edges.iter().zip(&ways) {
        let mut x = middles[edge.from];
        let mut path = format!("M{x} {}", top(depth[edge.from]) + HEIGHT);
        let stops = way.iter().copied().chain([middles[edge.to]]);
        for (row, stop) in (depth[edge.from] + 1..).zip(stops) {
            // Between rows a bend, beside stages straight down.
            let (above, below) = (top(row) - DOWN, top(row));
            let half = above.midpoint(below);
            _ = write!(path, "C{x} {half} {stop} {half} {stop} {below}");
            if row < depth[edge.to] {
                _ = write!(path, "V{}", below + HEIGHT);
            }
            x = stop;
        }
        _ = writeln!(svg, "<path d=\"{path}\" marker-end=\"url(#tip)\"/>");
    }
    for (index, stage) in stages.iter().enumerate() {
        let (x, y) = (middles[index] - WIDTH / 2, top(depth[index]));
        let below = match &stage.seconds {
            Some(seconds) => format!("{} · {seconds}", stage.state_label),
            None => stage.state_label.clone(),
        };
        _ = writeln!(
            svg,
            "<a href=\"#stage-{index}\" aria-label=\"{name}, {kind}, {below}\"><g class=\"{state}\"><rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" \
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

fn edges(stages: &[Stage]) -> Vec<Edge> {
    let mut edges = Vec::new();
    for (to, stage) in stages.iter().enumerate() {
        let mut from: Vec<usize> = stage.inputs.iter().map(|input| input.1).collect();
        from.sort_unstable();
        from.dedup();
        edges.extend(from.into_iter().map(|from| Edge { from, to }));
    }
    edges
}

/// The row of each stage: below all it is made from.
fn depths(stages: &[Stage]) -> Vec<usize> {
    // A recipe has no cycle, so that many rounds are enough.
    let mut depth = vec![0; stages.len()];
    for _ in 0..stages.len() {
        let mut settled = true;
        for (index, stage) in stages.iter().enumerate() {
            let above = stage.inputs.iter().map(|input| depth[input.1] + 1).max();
            let above = above.unwrap_or(0);
            if depth[index] < above && above < stages.len() {
                depth[index] = above;
                settled = false;
            }
        }
        if settled {
            break;
        }
    }
    depth
}

/// What stands in each row, from left to right.
fn rows(count: usize, edges: &[Edge], depth: &[usize]) -> Vec<Vec<Item>> {
    let deepest = depth.iter().max().map_or(0, |deepest| deepest + 1);
    let mut rows = vec![Vec::new(); deepest];
    for index in 0..count {
        rows[depth[index]].push(Item::Stage(index));
    }
    for (index, edge) in edges.iter().enumerate() {
        for row in rows
            .iter_mut()
            .take(depth[edge.to])
            .skip(depth[edge.from] + 1)
        {
            row.push(Item::Lane(index));
        }
    }
    // Where stages and edges were last seen, from the middle of their row.
    let mut stage_at = vec![0.; count];
    let mut edge_at: Vec<Option<f64>> = vec![None; edges.len()];
    for row in &mut rows {
        let source = |edge: usize| edge_at[edge].unwrap_or(stage_at[edges[edge].from]);
        let wanted = |item: &Item| match *item {
            Item::Lane(edge) => source(edge),
            Item::Stage(stage) => {
                let above = (0..edges.len()).filter(|&edge| edges[edge].to == stage);
                let above: Vec<f64> = above.map(source).collect();
                above.iter().sum::<f64>() / above.len().max(1) as f64
            }
        };
        let mut keyed: Vec<(f64, Item)> = row.iter().map(|item| (wanted(item), *item)).collect();
        keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
        *row = keyed.into_iter().map(|(_, item)| item).collect();
        let whole: usize = row.iter().map(|item| item.width() + ACROSS).sum();
        let mut left = -(whole as f64) / 2.;
        for item in row.iter() {
            let middle = left + (item.width() + ACROSS) as f64 / 2.;
            match *item {
                Item::Stage(stage) => stage_at[stage] = middle,
                Item::Lane(edge) => edge_at[edge] = Some(middle),
            }
            left += (item.width() + ACROSS) as f64;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &str, inputs: &[usize]) -> Stage {
        let inputs = inputs
            .iter()
            .map(|input| ("model".into(), *input, String::new()));
        Stage {
            name: name.into(),
            state: "fresh",
            inputs: inputs.collect(),
            ..Stage::default()
        }
    }

    #[test]
    fn stages_stand_below_what_they_are_made_from_and_lines_pass_beside_them() {
        let stages = [
            stage("a", &[]),
            stage("b", &[0]),
            stage("c", &[0, 1, 1]),
            stage("d", &[]),
        ];
        let (edges, depth) = (edges(&stages), depths(&stages));
        assert_eq!(depth, [0, 1, 2, 0]);
        assert_eq!(edges.len(), 3);
        let rows = rows(4, &edges, &depth);
        assert_eq!(rows[0], [Item::Stage(0), Item::Stage(3)]);
        // The line from a to c has a place of its own beside b.
        assert_eq!(rows[1].len(), 2);
        assert!(rows[1].contains(&Item::Lane(1)));
        let svg = draw(&stages);
        assert_eq!(svg.matches("<rect").count(), 4);
        assert_eq!(svg.matches("marker-end").count(), 3);
        assert!(draw(&[]).ends_with("</svg>"));
    }
}
