//! Sums over tokens and of squares.

use pipeline_kernels::reduce::{self, Order};

use super::{device, near, numbers, panels};

#[test]
fn sums_over_tokens() {
    let Some(device) = device() else { return };
    for (rows, columns, tokens) in [(1, 1, 1), (13, 16, 70), (64, 40, 33), (130, 17, 64)] {
        let (a, b) = (panels(rows, tokens, 1), panels(columns, tokens, 2));
        let (da, db) = (device.upload(&a).unwrap(), device.upload(&b).unwrap());
        for order in [Order::Straight, Order::Transposed] {
            let before = numbers(rows * columns + 5, 3);
            let mut expected = before.clone();
            reduce::outer((&a, rows), (&b, columns), &mut expected[5..], order);
            let mut ours = device.upload(&before).unwrap();
            device.outer((&da, rows), (&db, columns), &mut ours, 5, order);
            near(&device.read(&ours).unwrap(), &expected, 2e-6);
        }
        let mut expected = numbers(rows, 4);
        let mut ours = device.upload(&expected).unwrap();
        reduce::sum_over_tokens(&a, tokens, &mut expected);
        device.sum_over_tokens(&da, tokens, &mut ours);
        near(&device.read(&ours).unwrap(), &expected, 1e-6);
    }
}

#[test]
fn the_square_of_a_norm() {
    let Some(device) = device() else { return };
    let all = [
        numbers(70_000, 1),
        numbers(3, 2),
        Vec::new(),
        numbers(16_385, 3),
    ];
    let exact: f64 = all.iter().flatten().map(|x| f64::from(*x).powi(2)).sum();
    let buffers = all.each_ref().map(|values| device.upload(values).unwrap());
    let ours = device.sum_of_squares(&buffers.each_ref()).unwrap();
    assert!((ours / exact - 1.).abs() < 1e-6, "{ours} {exact}");
}
