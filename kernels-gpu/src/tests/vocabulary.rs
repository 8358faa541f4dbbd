//! Softmax over a vocabulary in parts against the CPU.

use pipeline_kernels::panels::LANES;
use pipeline_kernels::vocabulary::{Summary, online_softmax, soft_cap_slopes, sum_capped};

use super::{device, near, numbers};

#[test]
fn softmax_in_parts_with_and_without_a_soft_cap() {
    let Some(device) = device() else { return };
    let vocabulary = 700;
    for (softcap, size) in [(None, 30.), (Some(2.), 6.), (Some(30.), 40.)] {
        let logits: Vec<f32> = numbers(vocabulary * LANES * 2, 5)
            .iter()
            .map(|x| x * size)
            .collect();
        let mut expected = vec![Summary::EMPTY; 2];
        let mut summaries = device.summaries(2);
        for ids in [0..1, 1..65, 65..577, 577..700] {
            let of = |panel: usize, id: usize| (panel * vocabulary + id) * LANES;
            let part = |panel: usize| logits[of(panel, ids.start)..of(panel, ids.end)].to_vec();
            let mut part: Vec<f32> = (0..2).flat_map(part).collect();
            let mut ours = device.upload(&part).unwrap();
            if let Some(cap) = softcap {
                let mut sums = [[0.; LANES]; 2];
                sum_capped(&part, cap, &mut sums);
                let own = device.sum_capped(&ours, cap, ids.len());
                let sums: Vec<f32> = sums.into_iter().flatten().map(|x| x as f32).collect();
                near(&device.read(&own).unwrap(), &sums, 3e-6);
                let mut slopes = part.clone();
                soft_cap_slopes(&mut slopes, cap);
                let mut own = device.upload(&part).unwrap();
                device.soft_cap_slopes(&mut own, cap);
                near(&device.read(&own).unwrap(), &slopes, 1e-6);
            }
            let factors = online_softmax(&mut part, ids.clone(), softcap, &mut expected);
            let own = device.online_softmax(&mut ours, ids, softcap, &mut summaries);
            near(&device.read(&own).unwrap(), factors.as_flattened(), 5e-6);
            near(&device.read(&ours).unwrap(), &part, 5e-6);
        }
        let copy = device.same_summaries(&summaries);
        for summaries in [summaries, copy] {
            let ours = device.summary_values(&summaries).unwrap();
            assert_eq!(ours.len(), 2);
            for (ours, all) in ours.iter().zip(&expected) {
                assert_eq!(ours.argmax, all.argmax);
                near(&ours.largest, &all.largest, 1e-6);
                for lane in 0..LANES {
                    assert!((ours.log_sum(lane) - all.log_sum(lane)).abs() < 1e-5);
                    let far = (ours.entropy(lane) - all.entropy(lane)).abs();
                    assert!(far < 2e-5, "{softcap:?} {lane}: {far}");
                    let far = ours.log_sum_sq_probs(lane) - all.log_sum_sq_probs(lane);
                    assert!(far.abs() < 2e-5, "{softcap:?} {lane}: {far}");
                }
            }
        }
    }
}
