//! Small vocabularies of each kind, and what can be wrong with one.

use super::*;

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

/// Byte-level BPE over the letters a to e.
fn letters() -> (Vec<String>, Vec<TokenKind>, Vec<String>) {
    let tokens = [
        "<|end|>", "a", "b", "c", "Ġ", "ab", "Ġab", "1", "<tool>", "abc",
    ];
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    kinds[0] = TokenKind::Control;
    kinds[8] = TokenKind::UserDefined;
    (texts(&tokens), kinds, texts(&["a b", "Ġ ab"]))
}

fn bytes<'a>(
    lists: &'a (Vec<String>, Vec<TokenKind>, Vec<String>),
    pre: &'a str,
) -> Vocabulary<'a> {
    Vocabulary {
        model: "gpt2",
        pre: Some(pre),
        tokens: &lists.0,
        kinds: lists.1.clone(),
        merges: &lists.2,
        bos: Some(0),
        ..Vocabulary::default()
    }
}

#[test]
fn byte_level_tokens_merge_and_special_ones_are_found() {
    let lists = letters();
    let tokenizer = bytes(&lists, "smollm").tokenizer().unwrap();
    assert_eq!(ids(&tokenizer, "ab abc<tool>c11"), [5, 6, 3, 8, 3, 7, 7]);
    // Whole words are tokens with Llama 3's way, and BOS comes first.
    let tokenizer = bytes(&lists, "llama-bpe").tokenizer().unwrap();
    assert_eq!(ids(&tokenizer, "abc"), [9]);
    assert_eq!(tokenizer.encode("abc", true).unwrap().get_ids(), [0, 9]);
    let without = Vocabulary {
        add_bos: Some(false),
        ..bytes(&lists, "llama-bpe")
    };
    let tokenizer = without.tokenizer().unwrap();
    assert_eq!(tokenizer.encode("abc", true).unwrap().get_ids(), [9]);
    assert_eq!(tokenizer.decode(&[6, 0, 5], true).unwrap(), " abab");
    // Nothing in a token's text is taken for more than text.
    let mut odd = lists.clone();
    odd.0[0] = "$A:1 ".into();
    let around = Vocabulary {
        eos: Some(0),
        add_eos: Some(true),
        ..bytes(&odd, "llama-bpe")
    };
    let tokenizer = around.tokenizer().unwrap();
    assert_eq!(tokenizer.encode("abc", true).unwrap().get_ids(), [0, 9, 0]);
}

#[test]
fn each_way_to_split_can_be_made() {
    let lists = letters();
    let mut seen = HashSet::new();
    for name in splits::names() {
        assert!(seen.insert(name), "`{name}` is there twice");
        let tokenizer = bytes(&lists, name).tokenizer().unwrap();
        assert_eq!(ids(&tokenizer, "ab")[..], [5], "{name}");
    }
}

#[test]
fn what_contradicts_itself_is_refused() {
    let lists = letters();
    let error = |vocabulary: Vocabulary<'_>| format!("{:#}", vocabulary.tokenizer().unwrap_err());
    let text = error(bytes(&lists, "mine"));
    assert!(
        text.contains("`mine`") && text.contains("`llama-bpe`"),
        "{text}"
    );
    let rwkv = Vocabulary {
        model: "rwkv",
        ..bytes(&lists, "gpt-2")
    };
    assert!(error(rwkv).contains("`rwkv`"));
    let unigram = Vocabulary {
        model: "t5",
        ..bytes(&lists, "gpt-2")
    };
    let text = error(unigram);
    assert!(
        text.contains("`t5`") && text.contains("SentencePiece's unigram"),
        "{text}"
    );
    let beyond = Vocabulary {
        eos: Some(10),
        ..bytes(&lists, "gpt-2")
    };
    assert!(error(beyond).contains("`tokenizer.ggml.eos_token_id` is 10"));
    for (merge, why) in [("ab", "no pair"), ("", "no pair"), ("a x", "x")] {
        let odd = (lists.0.clone(), lists.1.clone(), texts(&[merge]));
        let text = error(bytes(&odd, "gpt-2"));
        assert!(text.contains(why), "{text}");
    }
    let mut twice = lists.clone();
    twice.0[3] = "a".into();
    assert!(error(bytes(&twice, "gpt-2")).contains("two tokens are `a`"));
    twice.0[3] = String::new();
    assert!(error(bytes(&twice, "gpt-2")).contains("the token 3 is empty"));
    twice.1.pop();
    twice.0[3] = "x".into();
    assert!(error(bytes(&twice, "gpt-2")).contains("10 tokens, but 9 types"));
}

#[test]
fn sentencepiece_merges_by_scores_and_falls_back_to_bytes() {
    let mut tokens = texts(&["<unk>", "<s>", "</s>"]);
    let mut kinds = vec![TokenKind::Unknown, TokenKind::Control, TokenKind::Control];
    for byte in 0..=255 {
        tokens.push(format!("<0x{byte:02X}>"));
        kinds.push(TokenKind::Byte);
    }
    let normal = ["▁", "a", "b", "ab", "▁ab", "ba", "  ", "\n\n"];
    tokens.extend(texts(&normal));
    kinds.resize(tokens.len() - 2, TokenKind::Normal);
    kinds.resize(tokens.len(), TokenKind::UserDefined);
    let mut scores = vec![0.; 259];
    // `ba` comes before `ab`.
    scores.extend([-10., -11., -12., -2., -3., -1., -1000., -1000.]);
    let made = |prefix| {
        let vocabulary = Vocabulary {
            model: "llama",
            tokens: &tokens,
            kinds: kinds.clone(),
            scores: &scores,
            unk: Some(0),
            bos: Some(1),
            add_space_prefix: prefix,
            ..Vocabulary::default()
        };
        vocabulary.tokenizer().unwrap()
    };
    let tokenizer = made(None);
    assert_eq!(ids(&tokenizer, "ab"), [263]);
    // aba: `ba` is merged first.
    assert_eq!(ids(&tokenizer, "aba"), [259, 260, 264]);
    assert_eq!(ids(&tokenizer, "é"), [259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.encode("ab", true).unwrap().get_ids(), [1, 263]);
    assert_eq!(tokenizer.decode(&[1, 263, 198, 172], true).unwrap(), "abé");
    // Without a space in front, tokens of spaces and newlines are found in the text.
    let tokenizer = made(Some(false));
    assert_eq!(ids(&tokenizer, "ab  ab\n\n ab"), [262, 265, 262, 266, 263]);
}
