//! `run_command`: a script of somebody between our stages, what makes it stale, what keeps it in its place, and how it fails.

use std::net::TcpListener;
use std::process::Command;

use serde_json::Value;

use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  blank:
    create_model:
      dataset: pairs
      vocab_size: 300
      hidden_size: 16
      intermediate_size: 32
      num_hidden_layers: 1
      num_attention_heads: 2
      num_key_value_heads: 1
      max_position_embeddings: 64
  changed:
    run_command:
      command: [python3, '{file.script}', '{input.model}', '{out}']
      inputs: { model: blank }
      files: { script: change.py }
      output: model
  adapter:
    attach_lora: { model: changed, r: 2, lora_alpha: 2, target_modules: [q_proj] }
outputs:
  adapter: out/adapter
";

const SCRIPT: &str = "\
import json, os, shutil, sys
model, out = sys.argv[1:3]
assert (model, out) == (os.environ['INPUT_MODEL'], os.environ['OUT'])
for name in os.listdir(model):
    shutil.copyfile(os.path.join(model, name), os.path.join(out, name))
path = os.path.join(out, 'config.json')
with open(path) as file:
    config = json.load(file)
config['rms_norm_eps'] = 1e-4
with open(path, 'w') as file:
    json.dump(config, file)
print('changed', len(os.listdir(out)), 'files')
";

/// Whether there is a Python to run scripts with.
fn has_python() -> bool {
    let found = Command::new("python3").arg("--version").output();
    let is_there = found.is_ok_and(|found| found.status.success());
    if !is_there {
        eprintln!("there is no python3, so nothing is tested");
    }
    is_there
}

fn project() -> Project {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}");
    let rows: Vec<String> = (0..4).map(row).collect();
    project.write("pairs.jsonl", &rows.join("\n"));
    project.write("change.py", SCRIPT);
    project
}

/// A recipe of one command that runs a script in Python.
fn scripted(project: &Project, script: &str, more: &str) {
    project.write("own.py", script);
    project.write(
        "own.yaml",
        &format!(
            "version: 1\nstages:\n  own:\n    run_command:\n      command: [python3, '{{file.script}}']\n      \
             files: {{ script: own.py }}\n{more}"
        ),
    );
}

#[test]
fn a_script_between_our_stages_is_cached_like_any_other() {
    if !has_python() {
        return;
    }
    let project = project();
    project.succeeds(&["validate", "r.yaml"]);
    assert_eq!(project.ran(&["r.yaml"]).len(), 4);
    let log = project.succeeds(&["log", "r.yaml", "changed"]);
    assert!(log.contains("changed") && log.contains("files"), "{log}");
    let show = project.succeeds(&["show", "r.yaml", "changed"]);
    assert!(
        show.starts_with("changed (run_command) made model"),
        "{show}"
    );
    assert!(project.ran(&["r.yaml"]).is_empty());
    // Another script that makes the same runs alone.
    project.write("change.py", &format!("# A remark.\n{SCRIPT}"));
    let why = project.succeeds(&["why", "r.yaml", "changed"]);
    assert!(why.contains("# A remark."), "{why}");
    assert_eq!(project.ran(&["r.yaml"]), ["changed"]);
    // One that makes something else runs with what takes from it.
    project.write("change.py", &SCRIPT.replace("1e-4", "1e-3"));
    assert_eq!(project.ran(&["r.yaml"]), ["adapter", "changed"]);
    project.write("change.py", SCRIPT);
    assert!(project.ran(&["r.yaml"]).is_empty());
}

#[test]
fn rows_written_as_json_lines_become_the_result() {
    if !has_python() {
        return;
    }
    let project = project();
    let script = "import json, os\nout = os.environ['OUT'] + '/'\nfor part in range(2):\n    \
                  with open(out + f'train-0000{part}-of-00002.jsonl', 'w') as file:\n        \
                  for n in range(3):\n            \
                  print(json.dumps({'prompt': f'p{part}{n}', 'chosen': 'c', 'rejected': 'r', 'more': {'n': n}}), file=file)\n\
                  open(out + 'test.jsonl', 'w').write(json.dumps({'prompt': 'q', 'chosen': 'c', 'rejected': 'r'}) + '\\n')\n";
    scripted(&project, script, "      output: dataset\n");
    let text = project.read("own.yaml");
    project.write(
        "own.yaml",
        &format!("{text}  chats: {{ apply_chat_template: {{ dataset: own, template: chat.jinja }} }}\noutputs: {{ own: out/own }}\n"),
    );
    project.write(
        "chat.jinja",
        "{%- for message in messages %}{{ message.content }}{% endfor %}",
    );
    assert_eq!(project.ran(&["own.yaml"]), ["chats", "own"]);
    let mut names: Vec<String> = std::fs::read_dir(project.path("out/own"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["test.parquet", "train.parquet"]);
    let show = project.succeeds(&["show", "own.yaml", "own"]);
    assert!(
        show.contains("p00") && show.contains("\"train\":6") && show.contains("\"test\":1"),
        "{show}"
    );
    // The same rows in one file are the same result, so nothing runs behind it.
    scripted(
        &project,
        &script
            .replace("range(2)", "[0, 1]")
            .replace("train-0000{part}-of-00002.jsonl', 'w'", "train.jsonl', 'a'"),
        "      output: dataset\n",
    );
    let text = project.read("own.yaml");
    project.write(
        "own.yaml",
        &format!(
            "{text}  chats: {{ apply_chat_template: {{ dataset: own, template: chat.jinja }} }}\n"
        ),
    );
    assert_eq!(project.ran(&["own.yaml"]), ["own"]);
    scripted(
        &project,
        "import os\nopen(os.environ['OUT'] + '/train.jsonl', 'w').write('{')\n",
        "      output: dataset\n",
    );
    let ended = project.run(&["run", "own.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("wrote no dataset that can be used")
            && ended.stderr.contains("train.jsonl"),
        "{}",
        ended.stderr
    );
}

#[test]
fn what_a_command_makes_is_checked() {
    if !has_python() {
        return;
    }
    let project = project();
    let make = |script: &str, output: &str| {
        scripted(
            &project,
            &format!("import os\nout = os.environ['OUT'] + '/'\n{script}\n"),
            &format!("      output: {output}\n"),
        );
    };
    make(
        "open(out + 'scores.json', 'w').write('{\"accuracy\": 0.5}')",
        "scores",
    );
    assert_eq!(project.ran(&["own.yaml"]), ["own"]);
    let show = project.succeeds(&["show", "own.yaml", "own"]);
    assert!(show.contains("accuracy") && show.contains("0.5"), "{show}");
    let table = project.succeeds(&["table", "own.yaml", "--json", "--sort", "accuracy"]);
    let rows: Value = serde_json::from_str(&table).unwrap();
    assert_eq!(rows[0]["metrics"]["own.accuracy"], 0.5);
    make("open(out + 'a.txt', 'w').write('a')", "folder");
    assert_eq!(project.ran(&["own.yaml"]), ["own"]);
    for (script, output, why) in [
        ("pass", "folder", "there is nothing in it"),
        ("pass", "dataset", "it has no splits"),
        (
            "open(out + 'train.parquet', 'w').write('a')",
            "dataset",
            "wrote no dataset that can be used",
        ),
        (
            "open(out + 'a.txt', 'w').write('a')",
            "model",
            "wrote no model that can be used",
        ),
        (
            "open(out + 'a.txt', 'w').write('a')",
            "adapter",
            "adapter_config.json",
        ),
        (
            "open(out + 'scores.json', 'w').write('[1]')",
            "scores",
            "no map",
        ),
        (
            "open(out + 'scores.json', 'w').write('{\"a\": \"b\"}')",
            "scores",
            "`a` in `scores.json` is no number",
        ),
        (
            "os.symlink('/etc/passwd', out + 'a')",
            "folder",
            "`a` is a link",
        ),
    ] {
        make(script, output);
        project.refuses(&["run", "own.yaml"], why);
    }
}

#[test]
fn a_failure_has_the_exit_code_and_the_last_lines() {
    if !has_python() {
        return;
    }
    let project = project();
    scripted(
        &project,
        "import sys\nfor n in range(30): print('line', n, flush=True)\nsys.exit('what is wrong')\n",
        "      output: folder\n",
    );
    let ended = project.run(&["run", "own.yaml"]);
    assert_eq!(ended.code, Some(1));
    for told in [
        "`python3` ended with exit code 1",
        "line 29",
        "what is wrong",
    ] {
        assert!(ended.stderr.contains(told), "{}", ended.stderr);
    }
    scripted(
        &project,
        "import os\nos.kill(os.getpid(), 9)\n",
        "      output: folder\n",
    );
    let ended = project.run(&["run", "own.yaml"]);
    assert!(
        ended.stderr.contains("by signal 9") || ended.stderr.contains("exit code 137"),
        "{}",
        ended.stderr
    );
    // One that does not end is ended, with what it started.
    scripted(
        &project,
        "import subprocess, time\nsubprocess.Popen(['sleep', '1000'])\ntime.sleep(1000)\n",
        "      output: folder\n    timeout: 2s\n",
    );
    project.refuses(&["run", "own.yaml"], "own");
    project.write("own.yaml", "version: 1\nstages: { own: { run_command: { command: [no-such-program], output: folder } } }\n");
    project.refuses(&["run", "own.yaml"], "no-such-program");
}

#[test]
fn a_command_is_kept_in_its_place() {
    if !has_python() {
        return;
    }
    let mut project = project();
    project.variable("PASSED_ON", "yes");
    project.variable("SECRET", "hidden");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let outside = project.path("outside.txt");
    let script = format!(
        "import os, socket\n\
         told = {{'passed': os.environ.get('PASSED_ON') == 'yes', 'secret': 'SECRET' in os.environ}}\n\
         try:\n    open({outside:?}, 'w').write('a')\n    told['wrote'] = True\n\
         except OSError:\n    told['wrote'] = False\n\
         try:\n    socket.create_connection(('127.0.0.1', {port}), 5).close()\n    told['connected'] = True\n\
         except OSError:\n    told['connected'] = False\n\
         open(os.environ['SCRATCH'] + '/own', 'w').write('a')\n\
         import json\n\
         json.dump({{k: int(v) for k, v in told.items()}}, open(os.environ['OUT'] + '/scores.json', 'w'))\n"
    );
    let told = |more: &str| -> Value {
        scripted(
            &project,
            &script,
            &format!("      output: scores\n      env: [PASSED_ON]\n{more}"),
        );
        project.succeeds(&["run", "own.yaml"]);
        let records = project.records();
        let record = records.iter().max_by_key(|record| {
            record["fingerprint"]["params"]["network"] == Value::Bool(!more.is_empty())
        });
        record.unwrap()["notes"].clone()
    };
    let notes = told("");
    assert_eq!(
        (&notes["passed"], &notes["secret"]),
        (&1.into(), &0.into()),
        "{notes}"
    );
    if notes["isolation"] == "none" {
        eprintln!("programs can't be isolated here, so that is not tested");
        return;
    }
    assert_eq!(
        (&notes["wrote"], &notes["connected"]),
        (&0.into(), &0.into()),
        "{notes}"
    );
    assert!(!outside.exists());
    let notes = told("      network: true\n");
    assert_eq!(
        (&notes["wrote"], &notes["connected"]),
        (&0.into(), &1.into()),
        "{notes}"
    );

    // Another version of a program makes the stage stale.
    project.write("version.txt", "1.0");
    let version = project.path("version.txt");
    let more = format!("      output: folder\n      version_of: [cat, {version:?}]\n");
    scripted(
        &project,
        "import os\nopen(os.environ['OUT'] + '/a', 'w').write('a')\n",
        &more,
    );
    assert_eq!(project.ran(&["own.yaml"]), ["own"]);
    assert!(project.ran(&["own.yaml"]).is_empty());
    project.write("version.txt", "1.1");
    let why = project.succeeds(&["why", "own.yaml", "own"]);
    assert!(why.contains("1.0") && why.contains("1.1"), "{why}");
    assert_eq!(project.ran(&["own.yaml"]), ["own"]);
}

#[test]
fn a_command_collects_what_a_matrix_made() {
    if !has_python() {
        return;
    }
    let project = project();
    project.write(
        "own.py",
        "import json, os\nfrom pathlib import Path\nall = Path(os.environ['INPUT_ALL'])\n\
         print(os.environ['OUT'])\n\
         json.dump({'count': len(list(all.iterdir())), 'first': len((all / '0').read_text()) if (all / '0').is_file() else len(os.listdir(all / '0'))},\n\
         open(os.environ['OUT'] + '/scores.json', 'w'))\n",
    );
    project.write(
        "own.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: pairs.jsonl } }\n  \
         split:\n    matrix: { seed: [1, 2, 3], share: [0.5] }\n    \
         split_dataset: { dataset: pairs, test_size: \"${share}\", seed: \"${seed}\" }\n  \
         all:\n    run_command:\n      command: [python3, '{file.script}']\n      files: { script: own.py }\n      \
         inputs: { all: { collect: [split] } }\n      output: scores\n  \
         some:\n    run_command:\n      command: [python3, '{file.script}']\n      files: { script: own.py }\n      \
         inputs: { all: { collect: 'split[seed=2]' } }\n      output: scores\n",
    );
    let ran = project.ran(&["own.yaml"]);
    assert_eq!(ran.len(), 6, "{ran:?}");
    let count = |stage: &str| -> Value {
        let records = project.records();
        let record = records.iter().rfind(|record| record["stage"] == stage);
        record.unwrap()["notes"]["count"].clone()
    };
    assert_eq!((count("all"), count("some")), (3.into(), 1.into()));
    // A value more runs what is new and what collects.
    let ran = project.ran(&["own.yaml", "--set", "stages.split.matrix.seed=[1, 2, 3, 4]"]);
    assert_eq!(ran, ["all", "split[seed=4,share=0.5]"]);
}
