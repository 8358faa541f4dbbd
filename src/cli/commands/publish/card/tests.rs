//! Cards by their parts.

use super::*;

#[test]
fn a_card_is_known_until_somebody_changes_it() {
    let card = Card::sealed("---\ntags:\n- pipeline\n---\n\n# A\n");
    assert!(is_ours(card.as_bytes()), "{card}");
    assert!(is_ours(card.replace('\n', "\r\n").as_bytes()));
    assert!(is_ours(card.trim_end().as_bytes()));
    assert!(!is_ours(card.replace("# A", "# B").as_bytes()));
    assert!(!is_ours(format!("{card}More.\n").as_bytes()));
    assert!(!is_ours(b"# Somebody's\n"));
    assert!(!is_ours(&[0xff, 0xfe]));
}

#[test]
fn tables_and_code_hold_any_text() {
    assert_eq!(fenced("x", "a ``` b"), "````x\na ``` b\n````\n");
    let shown = table(&["a", "b"], &[vec!["x|y".into(), "1\n2".into()]]);
    assert_eq!(shown, "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |\n\n");
    assert_eq!(number(Some(3.)), "3");
    assert_eq!(number(Some(0.000_012_3)), "1.230e-5");
    assert_eq!(number(Some(0.5)), "0.5000");
}

#[test]
fn a_folder_without_a_record_has_a_card() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"base_model_name_or_path": "owner/base"}"#;
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    let card = Card {
        name: "x",
        repo: "me/x",
        noun: "adapter",
        license: Some("mit"),
        lineage: None,
        folder: folder.path(),
    };
    let text = card.text().unwrap();
    let head = text
        .strip_prefix("---\n")
        .unwrap()
        .split("---\n")
        .next()
        .unwrap();
    let expected = "license: mit\nbase_model: owner/base\nbase_model_relation: adapter\nlibrary_name: peft\n\
                    pipeline_tag: text-generation\ntags:\n- lora\n- pipeline\n";
    assert_eq!(head, expected);
    assert!(text.contains("PeftModel.from_pretrained(model, \"me/x\")"));
    // A folder's name is no repository.
    std::fs::write(
        folder.path().join("adapter_config.json"),
        r#"{"base_model_name_or_path": "/home/me/base"}"#,
    )
    .unwrap();
    assert!(!card.text().unwrap().contains("base_model:"));
}
