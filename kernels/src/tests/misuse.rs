//! Wrong sizes end in a sentence, never in a wrong result or in somebody else's memory.

mod features;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::FloatType;
use crate::attention::{
    Gradients, Heads, Inputs, Scores, Span, Spans, Visible, attention, attention_backward,
};
use crate::bf16::pairs;
use crate::dropout::Dropout;
use crate::gated::Activation;
use crate::ggml::{BlockType, quantize};
use crate::matrix::{Matrix, Nf4, Values};
use crate::merge::{self, Update};
use crate::nf4;
use crate::panels::{self, LANES, column, fill, size};
use crate::product::{Factor, Onto, Pairs, Product, Term, product, products};
use crate::reduce::{Order, outer, sum_over_tokens};
use crate::team::Team;
use crate::vectors::{self, Attention, Cached, VectorProduct, vector_products};

/// Runs what has to panic with a message that contains `expected`.
fn refused<T>(what: &str, expected: &str, misuse: impl FnOnce() -> T) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(misuse)) else {
        panic!("{what} was accepted");
    };
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or_default();
    assert!(text.contains(expected), "{what}: {text}");
}

fn floats(count: usize) -> Vec<f32> {
    vec![1.; count]
}

#[test]
fn products_refuse_wrong_sizes() {
    let (w, x) = (floats(5 * 3), floats(size(3, 40)));
    let weight = Matrix::f32(&w, 5, 3).unwrap();
    let factor = Factor::F32(&x);
    let run = |out: usize, weight: Matrix<'_>, x: &Factor<'_>, onto: Onto<'_>| {
        product(&mut floats(out), vec![Term { weight, x }], onto);
    };
    let good = size(5, 40);
    run(good, weight, &factor, Onto::Zero);
    for bad in [good - 1, good + 1, good - 5 * LANES, 0] {
        let expected = if bad == 0 || bad == good - 5 * LANES {
            "the factor"
        } else {
            "the output"
        };
        refused("an output", expected, || {
            run(bad, weight, &factor, Onto::Zero);
        });
    }
    refused("a transposed weight", "the output", || {
        run(good, weight.transposed(), &factor, Onto::Zero);
    });
    let short = Factor::F32(&x[1..]);
    refused("a short factor", "the factor", || {
        run(good, weight, &short, Onto::Zero);
    });
    let values = floats(good - 1);
    refused("what is added to", "added to", || {
        run(good, weight, &factor, Onto::Values(&values));
    });
    let pairs = Factor::Pairs(Pairs::round(&floats(size(5, 40)), 5, |count| {
        vec![0; count]
    }));
    refused("pairs of another width", "the factor", || {
        run(good, weight, &pairs, Onto::Zero);
    });
    let other = floats(4 * 3);
    let other = Matrix::f32(&other, 4, 3).unwrap();
    refused("two heights", "heights of the weights", || {
        let terms = [weight, other].map(|weight| Term { weight, x: &factor });
        product(&mut floats(good), terms.into(), Onto::Zero);
    });
    let empty = Matrix::f32(&[], (1 << 59) + 1, 0).unwrap();
    refused("a height that wraps", "the output", || {
        run(LANES, empty, &Factor::F32(&[]), Onto::Zero);
    });
    assert!(Matrix::f32(&w, 3, 4).is_none());
    assert!(Matrix::f32(&[], usize::MAX, 2).is_none());
    let code = [0f32; 16];
    let nf4 = Nf4 {
        packed: &[0; 8],
        absmax: &[],
        code: &code,
        rounding: FloatType::F32,
    };
    assert!(Matrix::new(Values::Nf4(nf4), 5, 3).is_none());
}

#[test]
fn a_product_without_terms_or_depth_is_what_it_is_added_to() {
    let values: Vec<f32> = (0..size(2, 3)).map(|x| x as f32).collect();
    let empty = Matrix::f32(&[], 2, 0).unwrap();
    let nothing = Factor::F32(&[]);
    let term = || Term {
        weight: empty,
        x: &nothing,
    };
    for terms in [vec![], vec![term()], vec![term(), term()]] {
        for (onto, expected) in [
            (Onto::Zero, floats(0)),
            (Onto::Out, vec![f32::INFINITY; values.len()]),
            (Onto::Values(&values), values.clone()),
        ] {
            let mut out = vec![f32::INFINITY; values.len()];
            products(vec![Product {
                out: &mut out,
                terms: terms.clone(),
                onto,
                bias: None,
            }]);
            let zeros = vec![0.; out.len()];
            let expected = if expected.is_empty() { zeros } else { expected };
            assert_eq!(out, expected, "{onto:?}");
            if terms.is_empty() {
                continue;
            }
            let mut out = vec![0.; values.len()];
            products(vec![Product {
                out: &mut out,
                terms: terms.clone(),
                onto,
                bias: Some(&[2., 3.]),
            }]);
            let row = |index: usize| [2., 3.][index / LANES % 2];
            let values = match onto {
                Onto::Values(values) => values.to_vec(),
                _ => vec![0.; out.len()],
            };
            let expected = values.iter().enumerate();
            let expected: Vec<f32> = expected.map(|(index, x)| x + row(index)).collect();
            assert_eq!(out, expected, "{onto:?}");
        }
    }
    refused("a bias", "size of the bias", || {
        products(vec![Product {
            out: &mut floats(values.len()),
            terms: vec![term()],
            onto: Onto::Zero,
            bias: Some(&[1.; 3]),
        }]);
    });
    refused("what is added to", "added to", || {
        let out = &mut floats(values.len() - 1);
        product(out, Vec::new(), Onto::Values(&values));
    });
}

#[test]
fn pairs_and_panels_refuse_wrong_sizes() {
    let data = floats(size(3, 40));
    refused("pairs of a part", "to pair", || {
        Pairs::round(&data[1..], 3, |count| vec![0; count])
    });
    refused("pairs of other features", "to pair", || {
        Pairs::round(&data, 7, |count| vec![0; count])
    });
    refused("no features", "to pair", || {
        Pairs::round(&data, 0, |count| vec![0; count])
    });
    refused("too few pairs", "the pairs", || {
        pairs(&data, 3, &mut vec![0; 2 * LANES]);
    });
    let row = [0f32; 3];
    refused("a short row", "a row's features", || {
        fill(&mut floats(size(4, 2)), 4, 2, |_| &row);
    });
    refused("panels of other tokens", "the rows' panels", || {
        fill(&mut floats(size(3, 2)), 3, 33, |_| &row);
    });
    refused("a token behind the last panel", "range", || {
        column(&data, 3, 64).count()
    });
    assert_eq!(panels::size(usize::MAX, 33), usize::MAX);
    refused("dropout of other tokens", "dropped from", || {
        Dropout { start: 1, p: 0.5 }.apply(&mut floats(size(3, 2)), 3, &[0; 33]);
    });
}

#[test]
fn sums_refuse_wrong_sizes() {
    let (a, b) = (floats(size(3, 40)), floats(size(5, 40)));
    let run = |a: (&[f32], usize), b: (&[f32], usize), out: usize| {
        outer(a, b, &mut floats(out), Order::Straight);
    };
    run((&a, 3), (&b, 5), 15);
    refused("a result", "the result", || run((&a, 3), (&b, 5), 14));
    refused("a result that wraps", "the result", || {
        run((&[], (1 << 59) + 1), (&b, 32), 32);
    });
    refused("a", "the left", || run((&a[1..], 3), (&b, 5), 15));
    refused("b", "the right", || run((&a, 3), (&b[LANES..], 5), 15));
    refused("tokens", "what is summed", || {
        sum_over_tokens(&a, 30, &mut [0.; 3]);
    });
    let update = |a: usize, b: usize, columns: usize| (floats(a), floats(b), columns);
    for (what, expected, (a, b, columns), first, count) in [
        ("A", "of A", update(7, 4, 3), 0, 1),
        ("B", "of B", update(6, 5, 3), 0, 1),
        ("B of rank 0", "of B", update(0, 5, 3), 0, 1),
        ("values behind", "values of", update(6, 4, 3), 4, 3),
        (
            "a place that wraps",
            "values of",
            update(6, 4, 3),
            usize::MAX,
            2,
        ),
    ] {
        let update = Update {
            a: &a,
            b: &b,
            columns,
            scaling: 1.,
        };
        refused(what, expected, || {
            merge::add(update, first, &mut floats(count));
        });
    }
}

#[test]
fn four_bits_refuse_wrong_sizes() {
    refused("half a value", "no values", || {
        nf4::absmax(FloatType::F32, &[0; 7], &mut [0.; 1]);
    });
    refused("too many places", "places for", || {
        nf4::absmax(FloatType::F16, &[0; 128], &mut [0.; 2]);
    });
    refused("too few places", "places for", || {
        nf4::absmax(FloatType::F16, &[0; 130], &mut [0.; 1]);
    });
    refused("half a value", "no values", || {
        nf4::pack(FloatType::Bf16, &[0; 7], &mut [0; 2]);
    });
    for count in [31, 33] {
        refused("codes", "bytes for", || {
            nf4::pack(FloatType::Bf16, &[0; 128], &mut vec![0; count]);
        });
    }
    let code = [0f32; 16];
    let weight = Nf4 {
        packed: &[0; 64],
        absmax: &[1., 1.],
        code: &code,
        rounding: FloatType::F32,
    };
    weight.dequantise(3, &mut [0.; 125]);
    for (first, count) in [(0, 129), (128, 1), (usize::MAX, 2)] {
        refused("values behind the last", "bytes of codes", || {
            weight.dequantise(first, &mut vec![0.; count]);
        });
    }
    // What has no code gets any, and hurts nobody.
    let infinite = [0xff; 4 * 64 * 3];
    nf4::pack(FloatType::F32, &infinite, &mut [0; 96]);
}

#[test]
fn vectors_refuse_wrong_sizes() {
    let w = floats(5 * 3);
    let weight = Matrix::f32(&w, 5, 3).unwrap();
    let run = |weight: Matrix<'_>, x: usize, out: usize| {
        let (x, mut out) = (floats(x), floats(out));
        let all = vec![VectorProduct {
            weight,
            x: &x,
            rounded: false,
            out: &mut out,
        }];
        Team::gather(|team| vector_products(team, all));
    };
    run(weight, 6, 10);
    refused("a transposed weight", "is transposed", || {
        run(weight.transposed(), 5, 3);
    });
    refused("a part of a vector", "size of x", || run(weight, 7, 10));
    refused("a result", "output's size", || run(weight, 6, 9));
    let empty = Matrix::f32(&[], usize::MAX, 0).unwrap();
    refused("no depth", "output's size", || run(empty, 0, 1));
    let attend = |query: usize, keys: usize, values: usize, width: usize| {
        let attention = Attention {
            query: &floats(query),
            keys: Cached::F32(&floats(keys)),
            values: Cached::F32(&floats(values)),
            out: &mut floats(query),
            softcap: None,
            rounded: false,
        };
        attention.compute(width);
    };
    attend(8, 12, 12, 4);
    refused("no width", "the width", || attend(8, 12, 12, 0));
    refused("part of a head", "query heads", || attend(9, 12, 12, 4));
    refused("other values", "keys and values", || attend(8, 12, 8, 4));
    refused("no keys", "the keys", || attend(8, 0, 0, 4));
    refused("part of a key", "the keys", || attend(8, 10, 10, 4));
    refused("unlike dtypes", "stored differently", || {
        let attention = Attention {
            query: &floats(8),
            keys: Cached::F32(&floats(12)),
            values: Cached::Bf16(&[half::bf16::ONE; 12]),
            out: &mut floats(8),
            softcap: None,
            rounded: false,
        };
        attention.compute(4);
    });
    refused("part of a row", "rows as long", || {
        vectors::rms_norm(&floats(7), &floats(3), 1e-5, &mut floats(7));
    });
    refused("another result", "output's size", || {
        vectors::rms_norm(&floats(6), &floats(3), 1e-5, &mut floats(5));
    });
    vectors::rms_norm(&[], &[], 1e-5, &mut []);
    refused("unlike gates", "gate and up", || {
        vectors::gated_unit(Activation::Silu, &mut floats(4), &floats(5));
    });
    refused("unlike angles", "cos and sin", || {
        vectors::rope(&mut floats(8), 4, &floats(2), &floats(3));
    });
    refused("part of a head", "whole heads", || {
        vectors::rope(&mut floats(9), 4, &floats(2), &floats(2));
    });
    refused("a narrow head", "whole heads", || {
        vectors::rope(&mut floats(9), 3, &floats(2), &floats(2));
    });
}

fn seen(prefix: u32, from: u32, to: u32) -> Visible {
    Visible {
        first: 0,
        prefix,
        from,
        to,
    }
}

fn span(start: usize, visible: &[Visible]) -> Span {
    Span {
        start,
        visible: visible.to_vec(),
        context: Vec::new(),
    }
}

fn behind(context: &[usize], span: Span) -> Span {
    Span {
        context: context.to_vec(),
        ..span
    }
}

#[test]
fn spans_that_overlap_or_see_nothing_are_refused() {
    let one = [seen(0, 0, 1)];
    let good: Spans = [span(3, &one), span(4, &[]), span(4, &one)]
        .into_iter()
        .collect();
    assert_eq!(good.len(), 3);
    for (what, expected, bad) in [
        (
            "the same token",
            "overlaps",
            vec![span(3, &one), span(3, &one)],
        ),
        (
            "another order",
            "overlaps",
            vec![span(3, &one), span(0, &one)],
        ),
        ("nothing seen", "sees keys", vec![span(0, &[seen(0, 0, 0)])]),
        (
            "nothing of a branch",
            "sees keys",
            vec![span(0, &[seen(0, 1, 1), seen(0, 0, 2)])],
        ),
        ("a key behind", "sees keys", vec![span(0, &[seen(0, 0, 2)])]),
        (
            "a prefix behind",
            "sees keys",
            vec![span(0, &[seen(u32::MAX, 0, 1)])],
        ),
        ("behind all", "all memory", vec![span(usize::MAX, &one)]),
        (
            "a context that is not there",
            "the context of span 1 is span 2",
            vec![span(0, &one), behind(&[2], span(1, &one))],
        ),
        (
            "itself as context",
            "the context of span 0 is span 0",
            vec![behind(&[0], span(0, &one))],
        ),
        (
            "a key behind those of context and span",
            "sees keys",
            vec![span(0, &one), behind(&[0], span(1, &[seen(0, 0, 3)]))],
        ),
    ] {
        refused(what, expected, || bad.into_iter().collect::<Spans>());
    }
}

#[test]
fn attention_refuses_wrong_sizes() {
    const HEADS: Heads = Heads {
        queries: 4,
        keys: 2,
        width: 8,
    };
    let spans: Spans = [span(2, &[seen(0, 0, 1), seen(0, 0, 2)])]
        .into_iter()
        .collect();
    let (q, k, sums) = (size(32, 40), size(16, 40), size(4, 40));
    let forward = |heads: Heads, spans: &Spans, [q, k, v, out, sums]: [usize; 5]| {
        let (q, k, v) = (floats(q), floats(k), floats(v));
        let inputs = Inputs {
            q: &q,
            k: &k,
            v: &v,
        };
        let scores = Scores::of_width(4);
        attention(
            inputs,
            heads,
            scores,
            spans,
            &mut floats(out),
            &mut floats(sums),
        );
    };
    let backward = |sizes: [usize; 8]| {
        let [q, k, v, sums, out, grad_q, grad_k, grad_v] = sizes.map(floats);
        let (mut grad_q, mut grad_k, mut grad_v) = (grad_q, grad_k, grad_v);
        let inputs = Inputs {
            q: &q,
            k: &k,
            v: &v,
        };
        let mut gradients = Gradients {
            q: &mut grad_q,
            k: &mut grad_k,
            v: &mut grad_v,
        };
        let known = (&out[..], &sums[..], &q[..]);
        let scores = Scores::of_width(4);
        attention_backward(inputs, HEADS, scores, &spans, known, &mut gradients);
    };
    let good = [q, k, k, q, sums];
    forward(HEADS, &spans, good);
    for (queries, keys, width) in [(3, 2, 8), (4, 0, 8), (0, 2, 8), (4, 2, 0), (2, 4, 8)] {
        let heads = Heads {
            queries,
            keys,
            width,
        };
        refused("heads", "can't share", || forward(heads, &spans, good));
    }
    let expected = [
        "the queries",
        "the keys",
        "the values",
        "like the queries",
        "softmax's sums",
    ];
    for (index, expected) in expected.into_iter().enumerate() {
        let mut bad = good;
        bad[index] -= LANES;
        refused("forward", expected, || forward(HEADS, &spans, bad));
    }
    let far: Spans = [span(64, &[seen(0, 0, 1)])].into_iter().collect();
    refused("a span behind", "spans up to", || {
        forward(HEADS, &far, good);
    });
    let good = [q, k, k, sums, q, q, k, k];
    backward(good);
    for (index, expected) in [
        (3, "softmax's sums"),
        (4, "like the queries"),
        (5, "like the queries"),
        (6, "keys' gradient"),
        (7, "values' gradient"),
    ] {
        let mut bad = good;
        bad[index] -= LANES;
        refused("backward", expected, || backward(bad));
    }
}

#[test]
fn blocks_refuse_wrong_sizes() {
    for kind in BlockType::ALL {
        let (values, bytes) = (kind.values(), kind.bytes());
        let run =
            |values: usize, bytes: usize| quantize(kind, &floats(values), &mut vec![0; bytes]);
        run(3 * values, 3 * bytes);
        run(0, 0);
        refused("half a block", "whole blocks", || run(values / 2, bytes));
        for wrong in [0, bytes - 1, bytes + 1, 2 * bytes] {
            refused("another size", "bytes for the blocks", || {
                run(values, wrong);
            });
        }
    }
}
