//! Tests of `mix`.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{ArrayRef, Int64Array};
use serde_json::Value;

use super::*;

#[test]
fn the_order_is_that_of_interleave_datasets() {
    let golden = include_str!("../../../../tests/golden/data_files/golden.json");
    let golden: Value = serde_json::from_str(golden).unwrap();
    let cases = golden["mixes"].as_array().unwrap();
    assert!(cases.len() > 15);
    for case in cases {
        let read = |name: &str| serde_json::from_value(case[name].clone());
        let mix = Mix {
            probabilities: serde_json::from_value(case["probabilities"].clone()).unwrap(),
            seed: case["seed"].as_u64().unwrap(),
            stopping_strategy: read("stopping_strategy").unwrap(),
        };
        let lengths: Vec<usize> = serde_json::from_value(case["lengths"].clone()).unwrap();
        let order: String = mix
            .order(&lengths)
            .unwrap()
            .map(|source| source.to_string())
            .collect();
        assert_eq!(
            order,
            case["order"].as_str().unwrap(),
            "{mix:?} {lengths:?}"
        );
    }
}

#[test]
fn rows_follow_each_other_and_begin_anew() {
    let batch = |range: std::ops::Range<i64>| {
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(range));
        RecordBatch::try_from_iter([("n", numbers)]).unwrap()
    };
    let sources: Vec<Box<dyn Fn() -> Rows<'static>>> = vec![
        Box::new(move || Box::new([batch(0..3), batch(3..5)].map(Ok).into_iter())),
        Box::new(move || Box::new([batch(100..1000)].map(Ok).into_iter())),
    ];
    let mix = Mix {
        probabilities: None,
        seed: 0,
        stopping_strategy: StoppingStrategy::AllExhausted,
    };
    let mut mixed = Mixed::new(mix.order(&[5, 900]).unwrap(), sources);
    let mut rows = Vec::new();
    while let Some(batch) = mixed.batch().unwrap() {
        rows.extend(
            batch
                .column(0)
                .as_primitive::<Int64Type>()
                .values()
                .to_vec(),
        );
    }
    let expected: Vec<i64> = (0..900).flat_map(|n| [n % 5, 100 + n]).collect();
    assert_eq!(rows, expected);
}

#[test]
fn a_dataset_without_rows_can_t_be_drawn() {
    let mix = Mix {
        probabilities: Some(vec![0.5, 0.5]),
        seed: 0,
        stopping_strategy: StoppingStrategy::AllExhausted,
    };
    assert!(mix.order(&[0, 3]).is_err());
}
