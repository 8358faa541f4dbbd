//! Attention against plain loops in f64, and its gradients against differences.

use super::*;
use crate::dispatch::tests::with_each;
use crate::panels::size;
use crate::product::tests::numbers;

pub(crate) fn causal(start: usize, count: u32) -> Span {
    Span {
        start,
        visible: (0..count).map(Visible::causal).collect(),
        context: Vec::new(),
    }
}

/// A span whose tokens see all of their context first; the context has `count` tokens.
pub(crate) fn behind(context: &[usize], count: u32, mut span: Span) -> Span {
    for visible in &mut span.visible {
        visible.prefix += count;
        visible.from += count;
        visible.to += count;
    }
    span.context = context.to_vec();
    span
}

/// A tree: a start, two answers to it, a longer start behind it with three spans of its own, and a sequence for itself.
pub(crate) fn tree(start: usize, lengths: [u32; 7]) -> Spans {
    let [a, b, c, d, e, f, g] = lengths;
    let mut spans = Spans::default();
    let mut add = |context: &[usize], count: u32, make: &dyn Fn(usize) -> Span| {
        let at = spans
            .last()
            .map_or(start, |last: &Span| last.start + last.visible.len());
        spans.push(behind(context, count, make(at)));
    };
    add(&[], 0, &|at| causal(at, a));
    add(&[0], a, &|at| shared(at, b, c, d));
    add(&[0], a, &|at| causal(at, e));
    add(&[0, 2], a + e, &|at| causal(at, f));
    add(&[], 0, &|at| causal(at, g));
    add(&[0, 2], a + e, &|at| shared(at, c, d, b));
    add(&[0, 2, 3], a + e + f, &|at| causal(at, g));
    spans
}

/// The same spans where each token sees only the last `count` of its keys.
pub(crate) fn window(spans: &Spans, count: u32) -> Spans {
    spans.limited(|_, visible| {
        let shared = visible.prefix.min(visible.from);
        let seen = shared + (visible.to - visible.from);
        visible.without_first(seen.saturating_sub(count))
    })
}

/// The tokens of a span's keys.
pub(crate) fn keys(spans: &Spans, span: &Span) -> Vec<usize> {
    let context = span.context.iter().map(|number| &spans[*number]);
    let all = context.chain([span]);
    all.flat_map(|span| span.start..span.start + span.visible.len())
        .collect()
}

/// A prompt of `p` tokens with answers of `c` and `r`.
pub(crate) fn shared(start: usize, p: u32, c: u32, r: u32) -> Span {
    let at = |token: u32| {
        let from = if token < p {
            0
        } else if token < p + c {
            p
        } else {
            p + c
        };
        Visible {
            first: 0,
            prefix: p,
            from,
            to: token + 1,
        }
    };
    Span {
        start,
        visible: (0..p + c + r).map(at).collect(),
        context: Vec::new(),
    }
}

fn plain(q: &[f64], k: &[f64], v: &[f64], heads: Heads, spans: &Spans) -> Vec<f64> {
    let w = heads.width;
    let index = |features: usize, token: usize, f: usize| {
        (token / LANES * features + f) * LANES + token % LANES
    };
    let mut out = vec![0.; q.len()];
    for span in spans.iter() {
        let tokens = super::tests::keys(spans, span);
        for (t, visible) in span.visible.iter().enumerate() {
            for h in 0..heads.queries {
                let kh = h / (heads.queries / heads.keys);
                let seen = |key: &usize| {
                    let key = *key as u32;
                    (visible.first..visible.to).contains(&key)
                        && (key < visible.prefix || key >= visible.from)
                };
                let keys: Vec<usize> = (0..tokens.len()).filter(seen).collect();
                let at = |data: &[f64], count: usize, head: usize, token: usize, f: usize| {
                    data[index(count * w, token, head * w + f)]
                };
                let score = |key: &usize| {
                    let dot = (0..w).map(|f| {
                        at(q, heads.queries, h, span.start + t, f)
                            * at(k, heads.keys, kh, tokens[*key], f)
                    });
                    (dot.sum::<f64>() / (w as f64).sqrt()).exp()
                };
                let p: Vec<f64> = keys.iter().map(score).collect();
                let sum: f64 = p.iter().sum();
                for f in 0..w {
                    let values = keys.iter().zip(&p);
                    let value =
                        values.map(|(key, p)| p / sum * at(v, heads.keys, kh, tokens[*key], f));
                    out[index(heads.queries * w, span.start + t, h * w + f)] = value.sum();
                }
            }
        }
    }
    out
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

struct Case {
    heads: Heads,
    spans: Spans,
    tokens: usize,
}

fn cases() -> Vec<Case> {
    let heads = |queries, keys, width| Heads {
        queries,
        keys,
        width,
    };
    vec![
        Case {
            heads: heads(4, 2, 16),
            spans: [causal(0, 5), causal(5, 40), causal(50, 20)]
                .into_iter()
                .collect(),
            tokens: 70,
        },
        Case {
            heads: heads(2, 1, 12),
            spans: [shared(3, 37, 30, 45), causal(115, 1)]
                .into_iter()
                .collect(),
            tokens: 116,
        },
        Case {
            heads: heads(3, 3, 64),
            spans: [shared(0, 64, 33, 70)].into_iter().collect(),
            tokens: 167,
        },
        Case {
            heads: heads(4, 2, 24),
            spans: tree(2, [37, 5, 9, 14, 40, 1, 12]),
            tokens: 200,
        },
        Case {
            heads: heads(2, 1, 16),
            spans: window(&tree(2, [37, 5, 9, 14, 40, 1, 12]), 33),
            tokens: 200,
        },
    ]
}

#[test]
fn values_and_slopes_are_those_of_plain_loops() {
    for case in cases() {
        let heads = case.heads;
        let q = numbers(size(heads.queries * heads.width, case.tokens), 1);
        let q: Vec<f32> = q.iter().map(|x| x * 3.).collect();
        let k = numbers(size(heads.keys * heads.width, case.tokens), 2);
        let v = numbers(k.len(), 3);
        let g = numbers(q.len(), 4);
        let (wq, wk, wv) = (wide(&q), wide(&k), wide(&v));
        let exact = plain(&wq, &wk, &wv, heads, &case.spans);
        let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            let out = plain(q, k, v, heads, &case.spans);
            out.iter().zip(&g).map(|(a, b)| a * f64::from(*b)).sum()
        };
        let random = |count: usize, seed: u64| wide(&numbers(count, seed));
        with_each(|isa| {
            let inputs = Inputs {
                q: &q,
                k: &k,
                v: &v,
            };
            let mut out = vec![0.; q.len()];
            let mut log_sums = vec![0.; size(heads.queries, case.tokens)];
            let scores = Scores::of_width(heads.width);
            attention(inputs, heads, scores, &case.spans, &mut out, &mut log_sums);
            for (index, (a, b)) in out.iter().zip(&exact).enumerate() {
                assert!((f64::from(*a) - b).abs() < 2e-6, "{isa:?} {index}: {a} {b}");
            }
            let (mut grad_q, mut grad_k, mut grad_v) =
                (vec![0.; q.len()], vec![0.; k.len()], vec![0.; v.len()]);
            attention_backward(
                inputs,
                heads,
                scores,
                &case.spans,
                (&out, &log_sums, &g),
                &mut Gradients {
                    q: &mut grad_q,
                    k: &mut grad_k,
                    v: &mut grad_v,
                },
            );
            let moved = |x: &[f64], direction: &[f64], by: f64| -> Vec<f64> {
                let both = x.iter().zip(direction);
                both.map(|(x, d)| x + d * by).collect()
            };
            for seed in 0..3 {
                let (dq, dk, dv) = (
                    random(q.len(), 10 + seed),
                    random(k.len(), 20 + seed),
                    random(v.len(), 30 + seed),
                );
                let slope = |of: &[f32], d: &[f64]| -> f64 {
                    of.iter().zip(d).map(|(a, b)| f64::from(*a) * b).sum()
                };
                let by = 1e-4;
                for (name, ours, exact) in [
                    (
                        "q",
                        slope(&grad_q, &dq),
                        loss(&moved(&wq, &dq, by), &wk, &wv)
                            - loss(&moved(&wq, &dq, -by), &wk, &wv),
                    ),
                    (
                        "k",
                        slope(&grad_k, &dk),
                        loss(&wq, &moved(&wk, &dk, by), &wv)
                            - loss(&wq, &moved(&wk, &dk, -by), &wv),
                    ),
                    (
                        "v",
                        slope(&grad_v, &dv),
                        loss(&wq, &wk, &moved(&wv, &dv, by))
                            - loss(&wq, &wk, &moved(&wv, &dv, -by)),
                    ),
                ] {
                    let exact = exact / (2. * by);
                    let far = (ours - exact).abs();
                    assert!(
                        far < 2e-4 * (1. + exact.abs()),
                        "{isa:?} {name}: {ours} {exact}"
                    );
                }
            }
        });
    }
}
