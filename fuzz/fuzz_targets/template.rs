//! A chat template from anybody: it renders, or says why not; within its fuel, and within memory (`-rss_limit_mb`).
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use pipeline::text::chat::message;
use pipeline::text::template::ChatTemplate;

fuzz_target!(|source: &str| {
    let tokens = [
        ("bos_token", "<s>"),
        ("eos_token", "</s>"),
        ("pad_token", "<pad>"),
    ];
    let tokens: BTreeMap<String, String> = tokens
        .map(|(name, token)| (name.to_owned(), token.to_owned()))
        .into();
    let template = match ChatTemplate::new(source, tokens, None) {
        Ok(template) => template,
        Err(error) => {
            assert!(!format!("{error:#}").is_empty());
            return;
        }
    };
    let _ = template.markers();
    let messages = [
        message("system", "be brief"),
        message("user", "what is  {{ 1 + 1 }} <|eot_id|>?"),
        message("assistant", "two \u{1f600}\n"),
    ];
    for generation in [false, true] {
        let first = template.render(&messages, generation);
        let second = template.render(&messages, generation);
        match (first, second) {
            (Ok(first), Ok(second)) => assert_eq!(first, second, "a template has no memory"),
            (Err(first), Err(second)) => assert_eq!(first.to_string(), second.to_string()),
            _ => panic!("a template has no memory"),
        }
    }
});
