//! The bits of a row, whatever other rows are in its pass.

use super::*;
use crate::ml::loss::dpo::Dpo;

#[test]
fn the_bits_of_a_row_dont_depend_on_the_others_of_its_pass() {
    let model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let fused = Fused::new(&model, SHARED).unwrap();
    let others = rows("trl-1.16");
    // Every other row has one prompt, and two of them one preferred answer too.
    let mut rows: Vec<Row> = others[..6].to_vec();
    let prompt: Vec<u32> = others[6..10]
        .iter()
        .flat_map(|row| row.prompt.clone())
        .collect();
    for index in [0, 2, 4] {
        rows[index].prompt.clone_from(&prompt);
        rows[index].rejected_prompt = None;
    }
    rows[4].chosen = rows[0].chosen.clone();
    let rows: Vec<&Row> = rows.iter().collect();
    let loss = Dpo::sigmoid(0.1, 0.);
    let scores = |rows: &[&Row]| -> Vec<Vec<u32>> {
        let batch = loss.batch(rows, 1023).unwrap();
        let targets = loss.targets(&batch);
        let mut forward = fused.forward(&[&batch], Pass::INFER, false).unwrap();
        let logps = forward.score(&targets, false).unwrap().logps;
        let mut by_row = vec![Vec::new(); rows.len()];
        for (target, logp) in targets.iter().zip(logps) {
            by_row[target.row % rows.len()].push(logp.to_bits());
        }
        by_row
    };
    let together = scores(&rows);
    let batch = loss.batch(&rows, 1023).unwrap();
    assert!(
        SHARED.tokens(&[&batch]) + 2 * prompt.len() <= {
            let alone = rows.iter().map(|row| loss.batch(&[row], 1023).unwrap());
            alone.map(|batch| SHARED.tokens(&[&batch])).sum::<usize>()
        }
    );
    for (row, bits) in rows.iter().zip(together) {
        assert_eq!(scores(&[row]), [bits]);
    }
}
