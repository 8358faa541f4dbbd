//! Chat templates.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Attack, run};
use crate::support::program::Project;

const FUEL: &str = "steps and was stopped";
/// Whichever comes first on this machine.
const STOPPED: &str = "and was stopped";
const TIME: &str = "took longer than 5 s and was stopped";
const DEEP: &str = "nested too deeply";
const ROW: &str = "{\"prompt\": \"a\", \"chosen\": \"b\"}\n";
const PAIRS: &str = "  pairs: { import_dataset: { path: row.jsonl } }\n";

/// A template under a name, and words of its error.
type Template = (&'static str, String, &'static str);

fn attack(name: &'static str, template: &str, words: &'static str) -> Template {
    (name, template.to_owned(), words)
}

fn all(templates: Vec<Template>, beside: &str) {
    let project = Project::empty();
    project.write("row.jsonl", ROW);
    let attacks: Vec<Attack> = templates
        .into_iter()
        .map(|(name, template, words)| {
            project.write(&format!("{name}.jinja"), &template);
            let stage = format!(
                "{{ apply_chat_template: {{ dataset: pairs, template: {name}.jinja }}{beside} }}"
            );
            Attack::new(name, stage, words)
        })
        .collect();
    run(&project, PAIRS, &attacks);
}

#[test]
fn nested_sources_are_refused() {
    let chain = |name, begin: &str, piece: &str, end: &str| {
        let source = format!("{{{{ {begin}{}{end} }}}}", piece.repeat(20_000));
        attack(name, &source, DEEP)
    };
    let block = |name, begin: &str, end: &str, words: &'static str| {
        let source = format!("{}x{}", begin.repeat(5000), end.repeat(5000));
        attack(name, &source, words)
    };
    all(
        vec![
            chain("minus", "", "-", "1"),
            chain("not", "", "not ", "x"),
            chain("plus", "1", "+1", ""),
            chain("tilde", "1", "~1", ""),
            chain("and", "x", " and x", ""),
            chain("filters", "x", "|trim", ""),
            chain("attributes", "x", ".y", ""),
            chain("items", "x", "[0]", ""),
            chain("calls", "x", "()", ""),
            chain("tests", "x", " is string", ""),
            chain("ternaries", "x", " if x else x", ""),
            chain("brackets", "", "(", "x"),
            chain("lists", "", "[", "x"),
            chain("powers", "2", "**2", ""),
            attack(
                "elif",
                &format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(5000)),
                DEEP,
            ),
            attack(
                "targets",
                &format!(
                    "{{% for {}x{} in y %}}{{% endfor %}}",
                    "(".repeat(5000),
                    ")".repeat(5000)
                ),
                DEEP,
            ),
            block("ifs", "{% if x %}", "{% endif %}", "recursion"),
            block("fors", "{% for x in y %}", "{% endfor %}", "recursion"),
            block(
                "macros",
                "{% macro x() %}",
                "{% endmacro %}",
                "chat template",
            ),
            block(
                "filter_blocks",
                "{% filter trim %}",
                "{% endfilter %}",
                "recursion",
            ),
            block("set_blocks", "{% set x %}", "{% endset %}", "recursion"),
            block("withs", "{% with x = 1 %}", "{% endwith %}", "recursion"),
            block(
                "calls_of_blocks",
                "{% call x() %}",
                "{% endcall %}",
                "recursion",
            ),
            attack("long", &"{{ a }}".repeat(200_000), "it has more than 1 MiB"),
        ],
        "",
    );
}

#[test]
fn values_that_hold_themselves_end_one_stage() {
    let cycle = |rest: &str| format!("{{% set n = namespace() %}}{{% set n.a = n %}}{rest}");
    let deep = |rest: &str| {
        format!(
            "{{% set n = namespace(x=[]) %}}{{% for i in range(90000) %}}{{% set n.x = [n.x] %}}{{% endfor %}}{rest}"
        )
    };
    all(
        vec![
            attack("printed", &cycle("{{ n }}"), DEEP),
            attack(
                "compared",
                &cycle("{{ n == n }}{% set m = namespace() %}{% set m.a = m %}{{ n == m }}"),
                DEEP,
            ),
            attack(
                "as_json",
                &cycle("{{ n | tojson }}"),
                "can't be written as JSON",
            ),
            attack("as_text", &cycle("{{ n | string }}"), DEEP),
            attack("in_itself", &cycle("{{ n in [n] }}"), ""),
            attack(
                "sorted",
                &cycle("{{ [n, n] | sort }}"),
                "Python can't order",
            ),
            attack("deep", &deep(""), ""),
            attack("deep_printed", &deep("{{ n.x }}"), DEEP),
            attack("deep_compared", &deep("{{ n.x == [n.x] }}"), DEEP),
            attack("deep_as_json", &deep("{{ n.x | tojson }}"), "too deep"),
            attack(
                "macro_in_itself",
                "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
                "recursion",
            ),
            attack(
                "loop_in_itself",
                "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
                "recursion",
            ),
            attack(
                "includes_itself",
                "{% include 'chat template' %}",
                "reads another template",
            ),
            attack(
                "extends_itself",
                "{% extends 'chat template' %}",
                "reads another template",
            ),
            attack(
                "imports_itself",
                "{% import 'chat template' as t %}",
                "reads another template",
            ),
            attack(
                "block_in_itself",
                "{% block a %}{{ self.a() }}{% endblock %}",
                "recursion",
            ),
            attack(
                "caller",
                "{% macro m() %}{{ caller() }}{% endmacro %}{% macro n() %}{% call m() %}{{ n() }}{% endcall %}{% endmacro %}{{ n() }}",
                "recursion",
            ),
        ],
        "",
    );
}

#[test]
fn what_grows_is_stopped() {
    let lists = |rest: &str| {
        format!(
            "{{% set n = namespace(x=['a'], y=['a']) %}}{{% for i in range(60) %}}{{% set n.x = [n.x, n.x] %}}\
             {{% set n.y = [n.y, n.y] %}}{{% endfor %}}{rest}"
        )
    };
    let texts = |step: &str| {
        format!(
            "{{% set n = namespace(x='a') %}}{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}{{{{ n.x }}}}"
        )
    };
    all(
        vec![
            attack("lists_as_json", &lists("{{ n.x | tojson }}"), STOPPED),
            attack("lists_printed", &lists("{{ n.x }}"), STOPPED),
            attack(
                "lists_joined",
                &lists("{{ ''.join(n.x) }}"),
                "`join` takes texts",
            ),
            attack("lists_concatenated", &lists("{{ n.x ~ '' }}"), STOPPED),
            attack("lists_tested", &lists("{{ n.x is lower }}"), STOPPED),
            attack("lists_in_order", &lists("{{ n.x | pprint }}"), DEEP),
            attack("lists_filtered", &lists("{{ n.x | join }}"), STOPPED),
            attack(
                "lists_as_text",
                &lists("{{ n.x | string | length }}"),
                STOPPED,
            ),
            attack("lists_compared", &lists("{{ n.x == n.y }}"), TIME),
            attack("lists_sorted", &lists("{{ [n.x, n.y] | sort }}"), TIME),
            attack("lists_found", &lists("{{ n.x in [n.y] }}"), TIME),
            attack("texts_added", &texts("n.x + n.x"), STOPPED),
            attack("texts_joined", &texts("n.x ~ n.x"), STOPPED),
            attack("texts_replaced", &texts("n.x.replace('a', 'aa')"), STOPPED),
            attack(
                "texts_filtered",
                &texts("n.x | replace('a', 'aa')"),
                STOPPED,
            ),
            attack("texts_multiplied", &texts("n.x * 2"), STOPPED),
            attack("texts_formatted", &texts("'%s%s' % (n.x, n.x)"), STOPPED),
            attack("texts_format", &texts("'{}{}'.format(n.x, n.x)"), STOPPED),
            attack(
                "texts_indented",
                &texts("(n.x ~ '\\n' ~ n.x) | indent(10000)"),
                STOPPED,
            ),
            attack(
                "lists_added",
                "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
                STOPPED,
            ),
            attack(
                "wide",
                "{{ '{:1000000000}'.format(1) }}",
                "width above 10000",
            ),
            attack(
                "precise",
                "{{ '{:.1000000000f}'.format(1.0) }}",
                "precision above 10000",
            ),
            attack(
                "wide_percent",
                "{{ '%1000000000d' | format(1) }}",
                "width above 10000",
            ),
            attack(
                "wide_star",
                "{{ '%*d' | format(1000000000, 1) }}",
                "width above 10000",
            ),
            attack(
                "raised",
                "{{ raise_exception('x' * 10000000) }}",
                "the template refuses the row: xxx",
            ),
            attack("repeated", "{{ 'x' * 1000000000 }}", FUEL),
            attack(
                "centred",
                "{{ 'x'.center(1000000000) }}",
                "width above 10000",
            ),
            attack(
                "ranged",
                "{{ range(1000000000) | list }}",
                "too many elements",
            ),
            attack("powered", "{{ 2 ** 1000000000 }}", "unable to calculate"),
            attack("sliced", "{{ [0] * 1000000000 }}", "too large"),
            attack(
                "endless",
                "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
                FUEL,
            ),
        ],
        "",
    );
}

/// Compares two values that have 2^60 leaves each.
const STUCK: &str = "{% set n = namespace(x=['a'], y=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}\
    {% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}";

/// Neither `timeout:` nor Ctrl-C waits for a template.
#[test]
fn a_template_ends_with_its_timeout() {
    let template = attack("stuck", STUCK, "longer than its `timeout` of 1s");
    all(vec![template], ", timeout: 1s");
}

/// A run that has come to the template that is stuck.
fn stuck(project: &Project) -> Child {
    project.write("row.jsonl", ROW);
    project.write("stuck.jinja", STUCK);
    let recipe = format!(
        "version: 1\nstages:\n{PAIRS}  stuck: {{ apply_chat_template: {{ dataset: pairs, template: stuck.jinja }} }}\n"
    );
    project.write("recipe.yaml", &recipe);
    let mut run = project.command(&["run", "recipe.yaml", "--json"]);
    let mut child = run.spawn().unwrap();
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    let started = |line: &String| line.contains("stage_started") && line.contains("\"stuck\"");
    assert!(lines.map_while(Result::ok).any(|line| started(&line)));
    // It is at the template by now, or will be: either way it has to end.
    std::thread::sleep(Duration::from_millis(300));
    child
}

#[test]
fn a_template_ends_with_ctrl_c() {
    let project = Project::empty();
    let child = stuck(&project);
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130));
}

/// Its process must not go on writing once another run may have taken the stage over.
#[test]
#[cfg(target_os = "linux")]
fn a_stage_ends_with_the_run_that_was_killed() {
    let project = Project::empty();
    let mut child = stuck(&project);
    let children = || -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        let children = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("children")));
        let children: Vec<String> = children.map(Result::unwrap_or_default).collect();
        let pids = children.iter().flat_map(|line| line.split_whitespace());
        pids.map(str::to_owned).collect()
    };
    let mut stages = children();
    while stages.is_empty() {
        stages = children();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let alive = |pid: &String| {
        let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !status.is_empty() && !status.contains(") Z ") && status.contains("(exe)")
    };
    // The kernel ends it; only how soon it gets to that depends on the machine.
    for _ in 0..100 {
        if !stages.iter().any(alive) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{stages:?} are alive");
}
