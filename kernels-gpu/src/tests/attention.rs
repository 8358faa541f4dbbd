//! Attention and its backward pass against the CPU, over trees of spans.

use pipeline_kernels::attention as cpu;
use pipeline_kernels::attention::{Heads, Scores, Span, Visible};
use pipeline_kernels::panels::size;

use super::{device, near, numbers};
use crate::Attention;

/// Causal spans: a start, a prompt with two answers behind it, a second sequence behind the start, and one for itself.
fn tree(start: usize, [a, b, c, d]: [u32; 4]) -> cpu::Spans {
    let causal = |at: u32, before: u32| Visible {
        first: 0,
        prefix: before,
        from: before,
        to: before + at + 1,
    };
    let mut spans = cpu::Spans::default();
    let mut at = start;
    let mut add = |visible: Vec<Visible>, context: &[usize]| {
        let count = visible.len();
        spans.push(Span {
            start: at,
            visible,
            context: context.to_vec(),
        });
        at += count + 1;
    };
    add((0..a).map(|t| causal(t, 0)).collect(), &[]);
    // A prompt of `b` tokens and answers of `c` and `d`.
    let branch = |t: u32| {
        let from = [0, b, b + c][usize::from(t >= b) + usize::from(t >= b + c)];
        Visible {
            first: 0,
            prefix: a + b,
            from: a + from,
            to: a + t + 1,
        }
    };
    add((0..b + c + d).map(branch).collect(), &[0]);
    add((0..d).map(|t| causal(t, a)).collect(), &[0]);
    add((0..c).map(|t| causal(t, a + d)).collect(), &[0, 2]);
    add((0..b).map(|t| causal(t, 0)).collect(), &[]);
    spans
}

fn window(spans: &cpu::Spans, count: u32) -> cpu::Spans {
    spans.limited(|_, visible| visible.without_first(visible.count().saturating_sub(count)))
}

#[test]
fn attention_and_its_gradients() {
    let Some(device) = device() else { return };
    let capped = Scores {
        scale: 0.4,
        softcap: Some(1.5),
    };
    let heads = |queries, keys, width| Heads {
        queries,
        keys,
        width,
    };
    let whole = tree(3, [40, 21, 13, 35]);
    for (heads, scores, spans) in [
        (heads(1, 1, 1), Scores::of_width(1), tree(0, [1, 1, 1, 1])),
        (heads(4, 2, 12), Scores::of_width(12), whole.clone()),
        (heads(2, 1, 64), capped, window(&whole, 17)),
        (heads(6, 3, 5), Scores::of_width(5), window(&whole, 1)),
    ] {
        let last = spans.last().unwrap();
        let tokens = last.start + last.visible.len();
        let sizes = [heads.queries, heads.keys].map(|count| size(count * heads.width, tokens));
        let (q, g) = (numbers(sizes[0], 1), numbers(sizes[0], 4));
        let (k, v) = (numbers(sizes[1], 2), numbers(sizes[1], 3));
        let sums = size(heads.queries, tokens);
        let mut expected = [vec![7.; q.len()], vec![7.; sums]];
        let [out, log_sums] = &mut expected;
        let inputs = cpu::Inputs {
            q: &q,
            k: &k,
            v: &v,
        };
        cpu::attention(inputs, heads, scores, &spans, out, log_sums);
        let [dq, dk, dv, dg] = [&q, &k, &v, &g].map(|values| device.upload(values).unwrap());
        let [mut dout, mut dsums] =
            [q.len(), sums].map(|count| device.upload(&vec![7.; count]).unwrap());
        let table = device.spans(&spans);
        let attention = Attention {
            q: &dq,
            k: &dk,
            v: &dv,
            heads,
            scores,
            spans: &table,
        };
        device.attention(attention, &mut dout, &mut dsums);
        near(&device.read(&dout).unwrap(), out, 2e-6);
        near(&device.read(&dsums).unwrap(), log_sums, 2e-6);
        let mut grads = [&q, &k, &v].map(|values| vec![5.; values.len()]);
        let mut ours = grads
            .each_ref()
            .map(|values| device.upload(values).unwrap());
        let [grad_q, grad_k, grad_v] = &mut grads;
        cpu::attention_backward(
            inputs,
            heads,
            scores,
            &spans,
            (out, log_sums, &g),
            &mut cpu::Gradients {
                q: grad_q,
                k: grad_k,
                v: grad_v,
            },
        );
        let run = |ours: &mut [crate::Buffer; 3]| {
            device.attention_backward(attention, (&dout, &dsums, &dg), ours.each_mut());
            ours.each_ref().map(|buffer| device.read(buffer).unwrap())
        };
        let found = run(&mut ours);
        for (ours, theirs) in found.iter().zip(&grads) {
            near(ours, theirs, 3e-6);
        }
        // The same bits again.
        assert_eq!(found, run(&mut ours));
    }
}
