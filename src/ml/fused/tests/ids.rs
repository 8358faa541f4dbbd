//! Ids outside the vocabulary.

use super::*;

#[test]
fn an_id_outside_the_vocabulary_is_told() {
    let model = of_shape(2, 1, 16);
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let row = |id: u32| Row {
        prompt: vec![1, 2],
        chosen: vec![3, id],
        rejected: Some(vec![4]),
        ..Row::default()
    };
    let batch = objective.batch(&[&row(96)], 0).unwrap();
    let fused = Fused::new(&model, SHARED).unwrap();
    let (forward, _) = Forward::new(&fused, &[&batch], Pass::INFER, false, false).unwrap();
    let target = |id| Target {
        row: 0,
        position: 2,
        id,
    };
    assert!(forward.score(&[target(96)], false, false).is_ok());
    // In the first panel of logits, this would be a number of another token.
    for id in [97, 98, u32::MAX] {
        let error = forward.score(&[target(id)], true, true).err().unwrap();
        assert!(
            error.to_string().contains("outside the vocabulary of 97"),
            "{error}"
        );
    }
    let batch = objective.batch(&[&row(97)], 0).unwrap();
    assert!(Forward::new(&fused, &[&batch], Pass::INFER, false, false).is_err());
}
