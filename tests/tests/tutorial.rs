//! `docs/TUTORIAL.md`: its programs are the examples of `transformer-lm`, word for word, and they run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hvd_tests::binary;

/// In the order of the tutorial.
const PROGRAMS: [&str; 7] = ["model", "training", "checkpoints", "data", "distributed", "generation", "configuration"];

/// What the tutorial has to show.
const CALLS: &[&str] = &[
    "TransformerLM::new(",
    ".forward_t(",
    ".generate(",
    "run_distributed_training(",
    "save_checkpoint(",
    "load_checkpoint(",
    "load_preprocessed_data(",
    "get_dataloaders(",
    "setup_horovod(",
    "hvd_torch::rank(",
    "world_size",
    "local_rank",
    "is_main_process(",
    "metric_average(",
    "DistributedOptimizer::builder(",
    "broadcast_parameters(",
    "load_model_for_generation(",
    "generate_text(",
    "interactive_generation(",
    "load_config(",
    "Config::load(",
    ".to_dict(",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").to_path_buf()
}

fn tutorial() -> String {
    std::fs::read_to_string(repository().join("docs/TUTORIAL.md")).expect("the tutorial")
}

/// The Rust programs in the tutorial, each with the name of the example that the line before links to.
fn programs(text: &str) -> Vec<(String, String)> {
    let mut parts = text.split("```rust\n");
    let mut before = parts.next().unwrap_or_default();
    let mut programs = Vec::new();
    for part in parts {
        let (program, rest) = part.split_once("```\n").expect("the end of a program");
        let link = before.trim_end().rsplit("transformer-lm/examples/").next().unwrap_or_default();
        let name = link.split_once(".rs").map_or("no link before it", |(name, _)| name);
        programs.push((name.to_string(), program.to_string()));
        before = rest;
    }
    programs
}

#[test]
fn its_programs_are_the_examples() {
    let programs = programs(&tutorial());
    assert_eq!(programs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), PROGRAMS);
    let folder = repository().join("transformer-lm/examples");
    for (name, program) in &programs {
        let file = std::fs::read_to_string(folder.join(format!("{name}.rs"))).expect("an example");
        assert!(
            *program == file,
            "docs/TUTORIAL.md and transformer-lm/examples/{name}.rs differ; copy one to the other"
        );
    }
    let files = std::fs::read_dir(folder).expect("examples").flatten().map(|entry| entry.file_name().into_string());
    let files: BTreeSet<String> = files.map(|name| name.expect("a name")).collect();
    assert_eq!(files, PROGRAMS.iter().map(|name| format!("{name}.rs")).collect());
}

#[test]
fn it_shows_every_call() {
    let all: String = programs(&tutorial()).into_iter().map(|(_, program)| program).collect();
    let missing: Vec<&&str> = CALLS.iter().filter(|call| !all.contains(**call)).collect();
    assert!(missing.is_empty(), "not shown: {missing:?}");
}

/// Each heading has its line in the table of contents, in order, with the anchor that GitHub gives it.
#[test]
fn its_table_of_contents_is_right() {
    let text = tutorial();
    let headings = text.lines().filter_map(|line| line.strip_prefix("## "));
    let anchor = |heading: &str| -> String {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.collect::<String>().to_lowercase().replace(' ', "-")
    };
    let expected: Vec<String> = headings.map(|heading| format!("- [{heading}](#{})", anchor(heading))).collect();
    let contents: Vec<&str> = text.lines().filter(|line| line.starts_with("- [")).take(expected.len()).collect();
    assert_eq!(contents, expected);
}

/// Runs a command in `folder`; what it wrote.
fn run(folder: &Path, program: &Path, args: &[&str]) -> String {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "240"]).arg(program).args(args).current_dir(folder);
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    let output = command.output().expect("a process");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{} {args:?}: {}\n{out}{err}", program.display(), output.status);
    out.into_owned()
}

fn example(name: &str) -> PathBuf {
    let path = binary("lm").with_file_name("examples").join(name);
    assert!(path.is_file(), "the example {name} is not built; run `cargo build --workspace --examples` first");
    path
}

#[test]
fn its_programs_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    std::fs::write(folder.join("text.txt"), tutorial()).expect("a text");
    // As its first section says.
    let prepare = ["prepare", "--input", "text.txt", "--tokenizer", "byte", "--output", "data/tutorial"];
    assert!(tutorial().contains("lm prepare --input text.txt --tokenizer byte --output data/tutorial"));
    run(folder, &binary("lm"), &prepare);
    for name in PROGRAMS {
        run(folder, &example(name), &[]);
    }
    for name in ["training", "distributed"] {
        std::fs::remove_dir_all(folder.join("runs")).unwrap_or_default();
        let said = run(folder, &binary("hvdrun"), &["-np", "2", example(name).to_str().expect("a path")]);
        assert!(said.contains("2 rank"), "{said}");
    }
}
