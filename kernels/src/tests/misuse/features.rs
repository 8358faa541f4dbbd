//! Wrong sizes of the loops over features, tokens and the vocabulary.

use super::{floats, refused};
use crate::elementwise as each;
use crate::gated::{Activation, gated_unit, gated_unit_backward};
use crate::panels::{LANES, size};
use crate::vocabulary::sum_capped;
use crate::vocabulary::tests::exponentials;

#[test]
fn loops_over_features_refuse_wrong_sizes() {
    let panel = || floats(size(3, 40));
    let (w, inverse) = (floats(3), floats(size(1, 40)));
    let norm = "what is normed";
    refused("a norm's weight", norm, || {
        each::rms_norm(&panel(), &[1.; 7], 1., &mut panel(), &mut floats(64));
    });
    refused("no weight", norm, || {
        each::rms_norm(&panel(), &[], 1., &mut panel(), &mut floats(64));
    });
    refused("a norm's factors", "factors", || {
        each::rms_norm(&panel(), &w, 1., &mut panel(), &mut floats(32));
    });
    refused("a norm's result", "a norm", || {
        each::rms_norm(&panel(), &w, 1., &mut floats(96), &mut floats(64));
    });
    refused("the same again", "a norm", || {
        each::rms_norm_recompute(&panel(), &w, &inverse, &mut floats(96));
    });
    refused("the gradient that comes in", "a norm", || {
        each::rms_norm_backward(&panel(), &w, &inverse, &floats(96), &mut panel());
    });
    refused("the gradient that goes out", "a norm", || {
        each::rms_norm_backward(&panel(), &w, &inverse, &panel(), &mut floats(96));
    });
    refused("the weight's gradient", norm, || {
        each::rms_norm_grad_weight(&panel(), &inverse, &panel(), &mut floats(4));
    });
    let (x, angles) = (floats(size(12, 40)), floats(size(3, 40)));
    let rope = |features: usize, (pairs, width): (usize, usize), cos: &[f32], sin: &[f32]| {
        let rotary = each::Rotary {
            cos,
            sin,
            pairs,
            width,
        };
        each::rope(&mut x.clone(), features, rotary, false);
    };
    rope(12, (3, 6), &angles, &angles);
    rope(12, (3, 12), &angles, &angles);
    for (what, pairs, width) in [
        ("no pair", 0, 6),
        ("no head", 0, 0),
        ("half a head", 4, 8),
        ("more than a head", 4, 6),
        ("pairs that wrap", usize::MAX / 2 + 4, 6),
    ] {
        refused(what, "no heads", || {
            rope(12, (pairs, width), &angles, &angles);
        });
    }
    refused("other features", "is rotated", || {
        rope(18, (3, 6), &angles, &angles);
    });
    refused("short cosines", "cosines", || {
        rope(12, (3, 6), &angles[LANES..], &angles);
    });
    refused("short sines", "the sines", || {
        rope(12, (3, 6), &angles, &angles[..LANES]);
    });
    refused("a residual", "a norm", || {
        let short = (&floats(96)[..], 1.);
        each::rms_norm_onto(&panel(), &w, 1., short, &mut panel(), &mut floats(64));
    });
    refused("a sum with a residual", "a norm", || {
        let residual = (&panel()[..], 1.);
        each::rms_norm_onto(&panel(), &w, 1., residual, &mut floats(96), &mut floats(64));
    });
    refused("a scaled sum", "lengths of", || {
        each::scale_and_add(&mut floats(2), 1., &floats(3));
    });
    refused("logits to sum", "the logits", || {
        sum_capped(&floats(size(3, 40) - 1), 1., &mut [[0.; LANES]; 2]);
    });
    let lengths = "lengths of";
    refused("a gate", lengths, || {
        gated_unit(Activation::Silu, &floats(9), &floats(8), &mut floats(9));
    });
    refused("a gated result", lengths, || {
        gated_unit(Activation::Silu, &floats(9), &floats(9), &mut floats(8));
    });
    refused("a gate's gradient", lengths, || {
        gated_unit_backward(
            Activation::GeluTanh,
            &mut floats(9),
            &mut floats(8),
            &mut floats(9),
        );
    });
    refused("a gradient", lengths, || {
        gated_unit_backward(
            Activation::GeluTanh,
            &mut floats(9),
            &mut floats(9),
            &mut floats(10),
        );
    });
    refused("a sum", lengths, || {
        each::add(&mut floats(2), &floats(3), 1.);
    });
    refused("logits", "the logits", || {
        exponentials(&mut floats(size(3, 40)), 4)
    });
    refused("a huge vocabulary", "a vocabulary", || {
        exponentials(&mut [], 1 << 40)
    });
}
