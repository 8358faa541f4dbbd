//! Templates that are plain, and some that are not.

use std::collections::BTreeMap;

use super::*;
use crate::text::builtin::BuiltIn;

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens: BTreeMap<String, String> = tokens
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect();
    ChatTemplate::new(source, tokens, None).unwrap()
}

const CHATML: &str = "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}\
    <|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const GEMMA: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set loop_messages = messages[1:] %}\
    {% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}\
    {% set role = 'model' if m['role'] == 'assistant' else m['role'] %}<start_of_turn>{{ role }}\n{{ first if loop.first else '' }}\
    {{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}";
const MISTRAL: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}\
    {% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}[INST] \
    {% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}";
const LLAMA2: &str = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% elif m['role'] == 'user' %}\
    {{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}";

#[test]
fn turns_of_their_own_are_told_apart() {
    let turns = PlainTemplate::find(&template(CHATML)).unwrap();
    let system = ("<|im_start|>system\n", "<|im_end|>\n");
    assert_eq!(
        turns.system,
        System::Own(system.0.to_owned(), system.1.to_owned())
    );
    assert_eq!(turns.begin, "<|im_start|>system\nBe good.<|im_end|>\n");
    assert_eq!(turns.user.0, "<|im_start|>user\n");
    assert_eq!(turns.user.1, "<|im_end|>\n");
    assert_eq!(turns.assistant.0, turns.generation_prompt);
    assert!(!turns.trims);
    let go = turns.go_template(Some("<s>"));
    assert!(
        go.starts_with(
            "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}<|im_start|>system\nBe good.<|im_end|>\n{{ end }}"
        ),
        "{go}"
    );
}

#[test]
fn a_system_message_may_stand_in_the_first_user_turn_or_in_the_last() {
    let gemma = PlainTemplate::find(&template(GEMMA)).unwrap();
    assert_eq!(gemma.system, System::InFirst("\n\n".to_owned()));
    assert_eq!(gemma.begin, "<s>");
    assert!(gemma.trims);
    // llama.cpp puts the BOS there itself.
    let go = gemma.go_template(Some("<s>"));
    assert!(!go.contains("<s>") && go.contains("(eq $i 1)"), "{go}");
    assert!(gemma.go_template(None).starts_with("<s>"));

    let mistral = PlainTemplate::find(&template(MISTRAL)).unwrap();
    assert_eq!(mistral.system, System::InLast("\n\n".to_owned()));
    assert_eq!(mistral.assistant, (" ".to_owned(), "</s>".to_owned()));
    assert_eq!(mistral.generation_prompt, "");
}

#[test]
fn a_bos_before_each_turn_stays_but_for_the_first() {
    let llama2 = PlainTemplate::find(&template(LLAMA2)).unwrap();
    assert_eq!(llama2.system, System::None);
    assert_eq!(llama2.begin, "");
    let go = llama2.go_template(Some("<s>"));
    assert!(go.contains("{{ if gt $i 1 }}<s>{{ end }}[INST] "), "{go}");
}

#[test]
fn what_is_not_constant_is_no_plain_template() {
    let each = |inside: &str| format!("{{% for m in messages %}}{inside}{{% endfor %}}");
    for source in [
        each("{{ m['content'] | upper }}"),
        each("{{ loop.index }}: {{ m['content'] }}\n"),
        each("{{ m['content'] | length }} {{ m['content'] }}"),
        each("{{ m['content'] | replace('<', '&lt;') }}\n"),
        "{{ messages[0]['content'] }}".to_owned(),
        "Hello!".to_owned(),
        // Only the last answer is kept.
        each(
            "{% if m['role'] != 'assistant' or loop.index > 3 %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}",
        ),
    ] {
        assert_eq!(PlainTemplate::find(&template(&source)), None, "{source}");
    }
}

#[test]
fn texts_that_look_like_go_are_written_as_text() {
    assert_eq!(literal("a {{ b }}"), "a {{ \"{{\" }} b }}");
}

#[test]
fn the_end_of_two_texts_is_cut_between_characters() {
    assert_eq!(common_end("aé", "bé"), 2);
    assert_eq!(common_end("é", "\u{a9}"), 0);
    assert_eq!(common_end("", "x"), 0);
}

/// Phi-3's ends with an EOS where no answer is asked for.
#[test]
fn what_ends_a_whole_conversation_is_no_part_of_a_turn() {
    let phi = PlainTemplate::find(&template(BuiltIn::Phi3.source())).unwrap();
    let turn = |role: &str| (format!("<|{role}|>\n"), "<|end|>\n".to_owned());
    assert_eq!(
        (phi.user.clone(), phi.assistant.clone()),
        (turn("user"), turn("assistant"))
    );
    assert_eq!(phi.generation_prompt, "<|assistant|>\n");
    let (before, behind) = turn("system");
    assert_eq!(phi.system, System::Own(before, behind));
    assert!(!phi.go_template(None).contains("</s>"));
}

#[test]
fn every_built_in_template_is_plain() {
    for built_in in BuiltIn::ALL {
        let found = PlainTemplate::find(&template(built_in.source()));
        assert!(found.is_some(), "{}", built_in.name());
    }
}
