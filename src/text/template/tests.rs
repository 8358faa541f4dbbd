//! Tests of `template`.

use minijinja::value::Serde;
use serde_json::json;

use super::differences::{OTHERWISE, REFUSED};
use super::*;

fn messages(value: &serde_json::Value) -> Vec<Value> {
    Value::from(Serde(value)).try_iter().unwrap().collect()
}

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens = tokens
        .iter()
        .map(|(name, token)| ((*name).to_owned(), (*token).to_owned()))
        .collect();
    let date = NaiveDate::from_ymd_opt(2024, 7, 6);
    ChatTemplate::new(source, tokens, date).unwrap()
}

fn render(source: &str) -> Result<String> {
    template(source).render(&[super::message("user", " hi ")], true)
}

fn fails(source: &str) -> String {
    let rendered = ChatTemplate::new(source, BTreeMap::new(), None).and_then(|template| {
        template.render(&messages(&json!([{"role": "user", "content": "x"}])), true)
    });
    format!("{:#}", rendered.unwrap_err())
}

#[test]
fn expressions_print_as_in_python() {
    // Each right side was printed by Jinja 3.1.6 in transformers' environment.
    let cases = include_str!("cases.txt").lines();
    let mut wrong = Vec::new();
    for (source, expected) in cases.map(|line| line.split_once(" => ").unwrap()) {
        let expected: String = serde_json::from_str(expected).unwrap();
        match render(source) {
            Ok(printed) if printed == expected => {}
            other => wrong.push(format!("{source}\n  {expected:?}\n  {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn blocks_are_trimmed_and_one_last_newline_is_dropped() {
    let source = "{% if true %}\n  a\n    {% endif %}\nb\n    {%+ if true %}c{% endif +%}\n\n";
    assert_eq!(render(source).unwrap(), "  a\nb\n    c\n");
}

#[test]
fn a_mistral_like_template_checks_the_order_of_roles() {
    let source = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
        {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
        {% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}\
        {% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";
    let template = template(source);
    let good = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]);
    assert_eq!(
        template.render(&messages(&good), true).unwrap(),
        "<s>[INST] q [/INST]a</s>[INST] r [/INST]"
    );
    let bad = json!([{"role": "user", "content": "q"}, {"role": "user", "content": "a"}]);
    let error = template
        .render(&messages(&bad), true)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("refuses the row: Conversation roles must alternate"),
        "{error}"
    );
    assert!(template.markers().contains(&"[INST]".to_owned()));
}

#[test]
fn a_qwen_like_template_uses_namespace_and_tojson() {
    let source = r#"{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last < 0 and message.role == "user" and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') if message.content is string else '' %}
    {{- '<|im_start|>' + message.role + '\n' + content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '\n<call>' + (call.arguments | tojson) + '</call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}{{ ns.last }}
{%- endif %}"#;
    // Text, because `json!` doesn't keep the order of keys and a template prints it.
    let rows = r#"[{"role": "user", "content": "wo?"},
        {"role": "assistant", "content": "<think>x</think>\n\nhier",
         "tool_calls": [{"arguments": {"stadt": "Köln", "n": 1.0, "a": [true, null, "<&'\">"]}}]}]"#;
    let rows: serde_yaml::Value = serde_yaml::from_str(rows).unwrap();
    let rows: Vec<Value> = Value::from(Serde(&rows)).try_iter().unwrap().collect();
    let expected = "<|im_start|>user\nwo?<|im_end|>\n<|im_start|>assistant\nhier\n\
        <call>{\"stadt\": \"Köln\", \"n\": 1.0, \"a\": [true, null, \"<&'\\\">\"]}</call><|im_end|>\n<|im_start|>assistant\n0";
    assert_eq!(template(source).render(&rows, true).unwrap(), expected);
}

#[test]
fn a_llama_3_1_like_template_tells_the_date_and_marks_generation() {
    let source = r"{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{{- bos_token }}Today: {{ date_string }}
{% for message in messages %}
{%- if message.role == 'assistant' %}
{%- generation %}{% set inner = 'in' %}{{ message.content }}{{ eos_token }}{%- endgeneration %}
{%- else %}
[{{ message.content | trim }}]
{%- endif %}
{% endfor %}{{ inner }}";
    let rows = json!([{"role": "user", "content": " q "}, {"role": "assistant", "content": "a"}]);
    let printed = template(source).render(&messages(&rows), false).unwrap();
    assert_eq!(printed, "<s>Today: 06 Jul 2024\n[q]a</s>");
}

#[test]
fn errors_name_the_line_and_show_it() {
    let raised = fails("a\n{{ raise_exception('no system here') }}");
    assert!(
        raised.contains("line 2 of the chat template") && raised.contains("no system here"),
        "{raised}"
    );
    assert!(raised.contains("2 | {{ raise_exception"), "{raised}");
    let unknown = fails("\n\n{{ messages | frobnicate }}");
    assert!(
        unknown.contains("line 3") && unknown.contains("frobnicate"),
        "{unknown}"
    );
    let syntax = fails("{% if %}");
    assert!(syntax.contains("line 1"), "{syntax}");
    let undated = fails("{{ strftime_now('%Y') }}");
    assert!(undated.contains("hint: set `date"), "{undated}");
    let type_error = fails("{{ messages[0].nothing.more }}");
    assert!(type_error.contains("line 1"), "{type_error}");
}

#[test]
fn a_template_without_an_end_is_stopped() {
    let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    assert!(fails(nested).contains("steps and was stopped"));
    let growing = "{% set ns = namespace(text='abcdefgh') %}{% for _ in range(60) %}{% set ns.text = ns.text + ns.text %}{% endfor %}";
    assert!(fails(growing).contains("steps and was stopped"));
    let wide = "{% for a in range(9999) %}{% for b in range(9999) %}{{ 'abcdefgh' * 9999 }}{% endfor %}{% endfor %}";
    assert!(fails(wide).contains("steps and was stopped"));
    let long = "x".repeat(2 << 20);
    assert!(fails(&long).contains("the limit is 1 MiB"));
    let recursive = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}";
    assert!(!fails(recursive).is_empty());
}

#[test]
fn formats_of_dates_that_do_not_exist_are_errors() {
    let template = template("{{ strftime_now('%Q%!') }}");
    assert!(
        template
            .render(&[], false)
            .unwrap_err()
            .to_string()
            .contains("can't use the format")
    );
}

#[test]
fn a_template_reads_no_other_file() {
    for source in [
        "{% include '/etc/hostname' %}",
        "{% include '../secret.jinja' ignore missing %}",
        "{% extends 'base.jinja' %}",
        "{% import 'macros.jinja' as macros %}{{ macros.one() }}",
        "{%- from 'macros.jinja' import one -%}{{ one() }}",
    ] {
        let error = fails(source);
        assert!(
            error.contains("reads another template"),
            "{source}: {error}"
        );
        assert!(error.contains("line 1"), "{source}: {error}");
    }
}

/// A construct by jinja2 in transformers' environment.
#[derive(serde::Deserialize)]
struct Construct {
    source: String,
    /// What it prints; without it, it fails.
    text: Option<String>,
}

#[derive(serde::Deserialize)]
struct Constructs {
    variables: Value,
    constructs: Vec<Construct>,
}

fn constructs() -> Constructs {
    serde_json::from_str(include_str!(
        "../../../tests/golden/templates/constructs.json"
    ))
    .unwrap()
}

fn printed(source: &str, variables: Value) -> Result<String> {
    let date = NaiveDate::from_ymd_opt(2024, 7, 6);
    ChatTemplate::new(source, BTreeMap::new(), date)?.text(variables)
}

#[test]
fn constructs_print_what_jinja2_prints() {
    let Constructs {
        variables,
        constructs,
    } = constructs();
    assert!(constructs.len() > 1000);
    let mut wrong = Vec::new();
    for Construct { source, text } in &constructs {
        let found = printed(source, variables.clone());
        let refused = REFUSED.iter().find(|(known, _)| known == source);
        let otherwise = OTHERWISE.iter().any(|(known, _)| known == source);
        let well = match (text, &found) {
            (Some(text), Ok(found)) if text == found => refused.is_none() && !otherwise,
            (Some(_), Err(error)) => {
                refused.is_some_and(|(_, words)| format!("{error:#}").contains(words))
            }
            (None, Err(_)) => !otherwise,
            (_, Ok(_)) => otherwise,
        };
        if !well {
            wrong.push(format!(
                "{source:?}\n  jinja2: {text:?}\n  here:   {found:?}"
            ));
        }
    }
    for (source, _) in REFUSED.iter().chain(OTHERWISE) {
        let known = constructs
            .iter()
            .any(|construct| construct.source == *source);
        if !known {
            wrong.push(format!("{source:?} is no construct any more"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

proptest::proptest! {
    #[test]
    fn any_source_prints_or_is_told(pieces in proptest::collection::vec(proptest::sample::select(vec![
        "{{", "}}", "{%", "%}", "{#", "#}", "-", "+", " ", "\n", "\r", "if", "else", "endif", "for x in y", "endfor", "set a", "endset", "=",
        "macro m", "endmacro", "(", ")", "[", "]", "{", "}", "'é", "'", "\"", "\\", "\\U0001F600", "%", "~", "<", "x", ".items", "|", "is",
        "not", "1", "1e", "😀", "raw", "endraw", "generation", "with", "break", ",", ":", "*", "'%(a' % ", "'{:'.format(", "loop", "\u{2028}",
    ]), 0..25)) {
        let source = pieces.concat();
        for source in [source.clone(), format!("{{{{ {source} }}}}")] {
            let variables = Value::from_pairs([("x", "é"), ("y", "ab")]);
            // Both are well; a panic is not.
            let _ = printed(&source, variables);
        }
    }
}

/// For `tests/python/check_templates.py`, which compares the results with jinja2's.
#[test]
#[ignore = "renders the cases of the file that TEMPLATE_CASES names"]
#[expect(
    clippy::disallowed_methods,
    reason = "the script names its files in the environment"
)]
fn renders_the_cases_of_a_file() {
    #[derive(serde::Deserialize)]
    struct Case {
        source: String,
        variables: Value,
    }
    let path = |name: &str| std::env::var_os(name).unwrap();
    let cases = std::fs::read_to_string(path("TEMPLATE_CASES")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&cases).unwrap();
    let results: Vec<_> = cases
        .into_iter()
        .map(|case| match printed(&case.source, case.variables) {
            Ok(text) => json!({"text": text}),
            Err(error) => json!({"error": format!("{error:#}")}),
        })
        .collect();
    std::fs::write(
        path("TEMPLATE_RESULTS"),
        serde_json::to_string(&results).unwrap(),
    )
    .unwrap();
}

#[test]
fn the_engines_own_debug_is_no_part_of_a_template() {
    assert!(fails("{{ debug() }}").contains("debug"));
}
