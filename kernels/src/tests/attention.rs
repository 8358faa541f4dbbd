//! Attention in odd shapes, and in those of real models, against plain loops.

use super::guard::Side;
use super::shapes::{Dice, guarded_panels, near};
use crate::attention::tests::{behind, causal, keys as keys_of, shared, tree, window};
use crate::attention::{
    Gradients, Heads, Inputs, Scores, Span, Spans, Visible, attention, attention_backward,
};
use crate::dispatch::tests::with_each;
use crate::panels::{column, size};
use crate::product::tests::numbers;

/// Attention's result and the gradients of queries, keys and values, all by token.
struct Plain {
    out: Vec<f64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

/// Attention of rows by token in plain loops, and its backward from the gradient `g` of what it gives.
fn plain([q, k, v, g]: [&[f32]; 4], heads: Heads, scores: Scores, spans: &Spans) -> Plain {
    let Heads {
        queries,
        keys,
        width,
    } = heads;
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let (q, k, v, g) = (wide(q), wide(k), wide(v), wide(g));
    let mut all = Plain {
        out: vec![0.; q.len()],
        q: vec![0.; q.len()],
        k: vec![0.; k.len()],
        v: vec![0.; v.len()],
    };
    let scale = f64::from(scores.scale);
    // A score, and its derivative with respect to the product of a query and a key.
    let score = |product: f64| match scores.softcap.map(f64::from) {
        None => (scale * product, scale),
        Some(cap) => {
            let t = (scale * product / cap).tanh();
            (cap * t, scale * (1. - t * t))
        }
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for span in spans.iter() {
        let tokens = keys_of(spans, span);
        let Span { start, visible, .. } = span;
        for (token, seen) in visible.iter().enumerate() {
            for head in 0..queries {
                let own = ((start + token) * queries + head) * width;
                let own = own..own + width;
                let key = |key: u32| {
                    let index = tokens[key as usize] * keys + head / (queries / keys);
                    index * width..(index + 1) * width
                };
                let seen: Vec<u32> = (seen.first..seen.to)
                    .filter(|key| *key < seen.prefix || *key >= seen.from)
                    .collect();
                let scores: Vec<(f64, f64)> = seen
                    .iter()
                    .map(|at| score(dot(&q[own.clone()], &k[key(*at)])))
                    .collect();
                let most = scores.iter().map(|x| x.0).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|x| (x.0 - most).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|x| (x.0 - most).exp() / sum).collect();
                for (at, p) in seen.iter().zip(&p) {
                    for (out, v) in all.out[own.clone()].iter_mut().zip(&v[key(*at)]) {
                        *out += p * v;
                    }
                }
                let delta = dot(&all.out[own.clone()], &g[own.clone()]);
                for ((at, p), score) in seen.iter().zip(&p).zip(&scores) {
                    let slope = p * (dot(&v[key(*at)], &g[own.clone()]) - delta) * score.1;
                    for f in 0..width {
                        let (mine, its) = (own.start + f, key(*at).start + f);
                        all.v[its] += p * g[mine];
                        all.k[its] += slope * q[mine];
                        all.q[mine] += slope * k[its];
                    }
                }
            }
        }
    }
    all
}

fn check_attention(side: Side, heads: Heads, spans: &Spans, tokens: usize, seed: u64) {
    let plain = Scores::of_width(heads.width);
    // A scale under which most scores are near the cap, which is wide or narrow.
    let scale = plain.scale * 4.;
    let capped = |cap: f32| Scores {
        scale,
        softcap: Some(cap),
    };
    let scores = [plain, capped(0.3), capped(50.)][seed as usize / 50 % 3];
    check_scores(side, heads, scores, spans, tokens, seed);
}

fn check_scores(side: Side, heads: Heads, scores: Scores, spans: &Spans, tokens: usize, seed: u64) {
    let (q_features, k_features) = (heads.queries * heads.width, heads.keys * heads.width);
    let rows = [q_features, k_features, k_features, q_features];
    let rows: Vec<Vec<f32>> = rows
        .iter()
        .zip(seed..)
        .map(|(features, seed)| numbers(tokens * features, seed))
        .collect();
    let [q, k, v, g] = &rows[..] else {
        unreachable!("four")
    };
    let exact = plain([q, k, v, g], heads, scores, spans);
    let panels = |rows: &[f32], features: usize| guarded_panels(side, rows, features, tokens);
    let (pq, pk, pv, pg) = (
        panels(q, q_features),
        panels(k, k_features),
        panels(v, k_features),
        panels(g, q_features),
    );
    with_each(|isa| {
        let inputs = Inputs {
            q: &pq,
            k: &pk,
            v: &pv,
        };
        let zeros = |features: usize| side.copy(&vec![0f32; size(features, tokens)]);
        let (mut out, mut sums) = (zeros(q_features), zeros(heads.queries));
        attention(inputs, heads, scores, spans, &mut out, &mut sums);
        let (mut gq, mut gk, mut gv) = (zeros(q_features), zeros(k_features), zeros(k_features));
        let mut gradients = Gradients {
            q: &mut gq,
            k: &mut gk,
            v: &mut gv,
        };
        attention_backward(
            inputs,
            heads,
            scores,
            spans,
            (&out, &sums, &pg),
            &mut gradients,
        );
        for (name, ours, exact, features, bound) in [
            ("out", &out, &exact.out, q_features, 5e-6),
            ("q", &gq, &exact.q, q_features, 2e-5),
            ("k", &gk, &exact.k, k_features, 1e-4),
            ("v", &gv, &exact.v, k_features, 1e-4),
        ] {
            let what = format!("{isa:?} {name} {heads:?}, {scores:?}, {tokens}");
            for token in 0..tokens {
                let exact = &exact[token * features..][..features];
                near(&what, column(ours, features, token), exact, bound);
            }
        }
    });
}

#[test]
fn attention_of_any_shape() {
    let mut dice = Dice(7);
    for case in 0..30 {
        let keys = dice.throw(3) + 1;
        let heads = Heads {
            queries: keys * (dice.throw(4) + 1),
            keys,
            width: dice.size(50) + 1,
        };
        let mut spans = Spans::default();
        let mut tokens = 0;
        for _ in 0..dice.throw(6) {
            tokens += dice.throw(3);
            let length = dice.size(80) as u32;
            let span = if dice.throw(2) == 0 {
                causal(tokens, length)
            } else {
                shared(tokens, length, dice.size(40) as u32, dice.size(40) as u32)
            };
            // Some earlier spans in front of it, in any order.
            let context: Vec<usize> = (0..spans.len()).filter(|_| dice.throw(3) == 0).collect();
            let count: usize = context
                .iter()
                .map(|number| spans[*number].visible.len())
                .sum();
            let span = behind(&context, count as u32, span);
            tokens += span.visible.len();
            spans.push(span);
        }
        tokens += dice.throw(40);
        if dice.throw(2) == 0 {
            spans = window(&spans, dice.size(70) as u32 + 1);
        }
        check_attention(dice.side(), heads, &spans, tokens, 100 * case);
    }
}

/// Llama 3's heads, 8 queries a key 128 wide; widths that are no multiple of a panel; one head; and more than 512 tokens.
#[test]
fn attention_of_real_models() {
    for (queries, keys, width, length) in [
        (8, 1, 128, 70),
        (32, 8, 80, 9),
        (4, 2, 96, 40),
        (1, 1, 256, 33),
        (8, 1, 16, 600),
        (1, 1, 128, 530),
    ] {
        let heads = Heads {
            queries,
            keys,
            width,
        };
        let length = length as u32;
        let spans: Spans = [causal(1, length), shared(700, length / 2, 5, length / 3)]
            .into_iter()
            .collect();
        let tokens = 705 + length as usize;
        check_attention(Side::Behind, heads, &spans, tokens, 7);
        check_attention(Side::Behind, heads, &spans, tokens, 100);
    }
}

/// What waits to be added to the context's gradients has a bound: here it holds one key head of two at a time.
#[test]
fn contexts_whose_gradients_wait_in_turns() {
    let heads = Heads {
        queries: 2,
        keys: 2,
        width: 5,
    };
    let mut spans = Spans::default();
    spans.push(causal(0, 700));
    for number in 0..200 {
        spans.push(behind(&[0], 700, causal(700 + number, 1)));
    }
    check_attention(Side::Behind, heads, &spans, 900, 3);
}

#[test]
fn trees_of_any_shape() {
    let mut dice = Dice(11);
    for case in 0..12 {
        let heads = Heads {
            queries: 4,
            keys: 2,
            width: dice.size(40) + 1,
        };
        let lengths = std::array::from_fn(|_| dice.size(70) as u32 + 1);
        let spans = tree(dice.throw(40), lengths);
        let tokens = spans
            .last()
            .map_or(0, |last| last.start + last.visible.len());
        check_attention(dice.side(), heads, &spans, tokens, 50 + case);
        let spans = window(&spans, dice.size(60) as u32 + 1);
        check_attention(dice.side(), heads, &spans, tokens, 50 + case);
    }
}

/// A window leaves the last of the keys that a token sees, in its branch and in what the branches share.
#[test]
fn a_window_leaves_the_last_keys() {
    let keys = |seen: Visible| -> Vec<u32> {
        (seen.first..seen.to)
            .filter(|key| *key < seen.prefix || *key >= seen.from)
            .collect()
    };
    for (prefix, from, to) in [(0, 0, 9), (4, 0, 9), (0, 3, 9), (4, 6, 9), (4, 4, 9)] {
        let seen = Visible {
            first: 0,
            prefix,
            from,
            to,
        };
        let all = keys(seen);
        for count in 0..12 {
            let left = keys(seen.without_first(count));
            let dropped = (count as usize).min(all.len() - 1);
            assert_eq!(left, all[dropped..], "{seen:?} without {count}");
        }
    }
}

/// Keys in front of all windows of a block of queries are left out: what lies there can be anything.
#[test]
fn keys_outside_of_all_windows_are_not_computed() {
    let heads = Heads {
        queries: 2,
        keys: 1,
        width: 8,
    };
    let (tokens, count) = (200, 40);
    let spans: Spans = [causal(0, tokens as u32)].into_iter().collect();
    let spans = window(&spans, count);
    // What the last 32 tokens see begins at token 168 + 1 - 40, so the panels in front of that one count for nothing.
    let (last, unseen) = (192, 128);
    let q = numbers(size(16, tokens), 1);
    let run = |k: &[f32], v: &[f32]| {
        let inputs = Inputs { q: &q, k, v };
        let (mut out, mut sums) = (vec![0.; q.len()], vec![0.; size(2, tokens)]);
        let scores = Scores::of_width(heads.width);
        attention(inputs, heads, scores, &spans, &mut out, &mut sums);
        (last..tokens)
            .flat_map(|token| column(&out, 16, token).collect::<Vec<_>>())
            .collect::<Vec<f32>>()
    };
    let (mut k, mut v) = (numbers(size(8, tokens), 2), numbers(size(8, tokens), 3));
    let before = run(&k, &v);
    for data in [&mut k, &mut v] {
        data[..size(8, unseen)].fill(f32::NAN);
    }
    assert_eq!(run(&k, &v), before);
}
