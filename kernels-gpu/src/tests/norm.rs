//! RMS norms and their gradients against the CPU.

use pipeline_kernels::elementwise;
use pipeline_kernels::panels::size;

use super::{device, near, numbers, panels};

#[test]
fn norms_and_their_sum_with_a_residual() {
    let Some(device) = device() else { return };
    for (features, heads, tokens) in [
        (1, 1, 1),
        (7, 1, 33),
        (64, 3, 70),
        (300, 1, 64),
        (129, 2, 5),
    ] {
        let x = panels(features * heads, tokens, 1);
        let residual = panels(features * heads, tokens, 2);
        let weight = numbers(features, 3);
        let mut expected = (vec![0.; x.len()], vec![0.; size(heads, tokens)]);
        elementwise::rms_norm(&x, &weight, 1e-5, &mut expected.0, &mut expected.1);
        let (dx, dw) = (device.upload(&x).unwrap(), device.upload(&weight).unwrap());
        let mut out = device.allocate(x.len()).unwrap();
        let mut inverse = device.allocate(size(heads, tokens)).unwrap();
        device.rms_norm(&dx, &dw, 1e-5, &mut out, &mut inverse);
        near(&device.read(&out).unwrap(), &expected.0, 1e-6);
        near(&device.read(&inverse).unwrap(), &expected.1, 1e-6);
        let onto = device.upload(&residual).unwrap();
        let added = (&residual[..], 0.7);
        elementwise::rms_norm_onto(&x, &weight, 1e-5, added, &mut expected.0, &mut expected.1);
        device.rms_norm_onto(&dx, &dw, 1e-5, (&onto, 0.7), &mut out, &mut inverse);
        near(&device.read(&out).unwrap(), &expected.0, 1e-6);
        let mut again = device.allocate(x.len()).unwrap();
        elementwise::rms_norm(&x, &weight, 1e-5, &mut expected.0, &mut expected.1);
        device.rms_norm_recompute(&dx, &dw, &inverse, &mut again);
        near(&device.read(&again).unwrap(), &expected.0, 1e-6);
        let (grad, mut grad_x) = (panels(features * heads, tokens, 4), numbers(x.len(), 5));
        let (dg, mut dgx) = (
            device.upload(&grad).unwrap(),
            device.upload(&grad_x).unwrap(),
        );
        elementwise::rms_norm_backward(&x, &weight, &expected.1, &grad, &mut grad_x);
        device.rms_norm_backward(&dx, &dw, &inverse, &dg, &mut dgx);
        near(&device.read(&dgx).unwrap(), &grad_x, 2e-6);
        let mut grad_weight = numbers(features, 6);
        let mut dgw = device.upload(&grad_weight).unwrap();
        elementwise::rms_norm_grad_weight(&x, &expected.1, &grad, &mut grad_weight);
        device.rms_norm_grad_weight(&dx, &inverse, &dg, &mut dgw);
        near(&device.read(&dgw).unwrap(), &grad_weight, 2e-6);
    }
}
