//! Random texts and random damage to a right recipe never panic, and every span lies in the text.

use proptest::prelude::*;

use super::*;

fn sound(text: &str) {
    if let Err(errors) = read(text) {
        assert!(!errors.0.is_empty());
        let lines = source_map::lines(text).len();
        for error in errors.0 {
            assert!(
                error.span.is_none_or(|span| span.line <= lines.max(1)),
                "{error}"
            );
            assert!(
                !error.message.contains('$') || text.contains('$'),
                "{error}"
            );
        }
    }
}

proptest! {
    #[test]
    fn any_text(text in any::<String>()) {
        sound(&text);
    }

    #[test]
    fn yaml_like_text(text in "([a-z&*!{}\\[\\]:,\"'|>#$<-]|\n|  |: ){0,60}") {
        sound(&text);
        let _ = set(GOOD, &[("stages.tuned.train_toy.beta", &text), (&text, "1")]);
    }

    #[test]
    fn damaged_recipe(damage in prop::collection::vec((0..GOOD.len(), "[ -~\n]{0,3}", 0..4_usize), 1..6)) {
        let mut text = GOOD.to_owned();
        for (at, insert, delete) in damage {
            let at = at.min(text.len());
            let end = (at + delete).min(text.len());
            text.replace_range(at..end, &insert);
        }
        sound(&text);
    }
}
