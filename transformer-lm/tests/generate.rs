//! `generate` as people run it: the built binary, with a small checkpoint, also in a real pseudo-terminal.

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rexpect::session::PtySession;
use tch::{Device, Tensor};
use tempfile::TempDir;
use transformer_lm::data::Tokenizer;
use transformer_lm::generate::{TextParams, generate_text, load_model_for_generation, stream_text};
use transformer_lm::model::ModelConfig;

const WATCHDOG_MS: u64 = 60_000;

fn shape() -> ModelConfig {
    ModelConfig { vocab_size: 256, d_model: 16, n_heads: 2, n_layers: 2, d_ff: 32, max_seq_len: 32, ..support::tiny() }
}

/// A checkpoint without an optimizer: enough to generate.
fn checkpoint() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    std::fs::create_dir(&path).unwrap();
    let (_store, model) = support::lively_model(&shape(), tch::Kind::Float);
    Tensor::write_safetensors(&model.parameters(), path.join("model.safetensors")).unwrap();
    let yaml =
        "model: {vocab_size: 256, pad_token_id: null, d_model: 16, n_heads: 2, n_layers: 2, d_ff: 32, max_seq_len: 32}";
    std::fs::write(path.join("config.yaml"), yaml).unwrap();
    std::fs::write(path.join("state.json"), "{}").unwrap();
    Tokenizer::Byte.save(&path).unwrap();
    (folder, path)
}

fn command(checkpoint: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    command.arg("--checkpoint").arg(checkpoint);
    command.env("OMP_NUM_THREADS", "1");
    command
}

fn run(checkpoint: &Path, args: &[&str]) -> Output {
    command(checkpoint).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text_of(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn streaming_and_batches_give_the_same_text() {
    let (_folder, path) = checkpoint();
    let (model, tokenizer, config) = load_model_for_generation(&path, None, Device::Cpu).unwrap();
    assert_eq!(config.model.d_model, 16);
    let params = TextParams { max_new_tokens: 50, ..TextParams::default() };
    let texts = generate_text(&model, &tokenizer, "abc", &params, 3).unwrap();
    assert_eq!(texts.len(), 3);
    assert_ne!(texts[0], texts[1]);
    let pieces: String = stream_text(&model, &tokenizer, "abc", &params).unwrap().map(Result::unwrap).collect();
    assert_eq!(texts[0], format!("abc{pieces}"));
    assert_eq!(generate_text(&model, &tokenizer, "abc", &params, 1).unwrap(), texts[..1]);
    assert!(generate_text(&model, &tokenizer, "", &params, 0).unwrap().is_empty());
}

#[test]
fn flags_take_dashes_and_underscores_and_the_seed_decides() {
    let (folder, path) = checkpoint();
    let dashes =
        run(&path, &["--prompt", "abc", "--max-new-tokens", "20", "--top-k=5", "--top-p", "0.8", "--seed", "7"]);
    let underscores =
        run(&path, &["--prompt", "abc", "--max_new_tokens", "20", "--top_k=5", "--top_p", "0.8", "--seed=7"]);
    let text = text_of(&dashes);
    assert!(text.starts_with("abc") && text.ends_with('\n'));
    assert_eq!(text, text_of(&underscores));
    assert_ne!(text, text_of(&run(&path, &["--prompt", "abc", "--max_new_tokens", "20", "--seed", "8"])));
    assert!(!text.contains('\u{1b}'), "no colour where there is no terminal");

    let file = folder.path().join("texts.txt");
    let args = ["--num_samples", "2", "--max_new_tokens", "5", "--output", file.to_str().unwrap()];
    let text = text_of(&run(&path, &args));
    assert!(text.contains("--- sample 2 of 2 ---"));
    assert_eq!(std::fs::read_to_string(file).unwrap(), text);
}

#[test]
fn a_run_folder_stands_for_its_best_checkpoint() {
    let (folder, path) = checkpoint();
    let run_folder = folder.path().join("20260101-000000_gpt");
    std::fs::create_dir(&run_folder).unwrap();
    std::fs::rename(&path, run_folder.join("best_model")).unwrap();
    text_of(&run(&run_folder, &["--max_new_tokens", "3"]));
}

#[test]
fn mistakes_are_told_in_one_line() {
    let (folder, path) = checkpoint();
    let refused = |args: &[&str], code: i32, message: &str| {
        let output = run(&path, args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(code), true), "{error}");
        assert!(error.contains(message) && !error.contains("panicked"), "{error}");
    };
    refused(&["--temperature", "-1"], 2, "temperature = -1");
    refused(&["--top_p", "0"], 2, "top_p = 0");
    refused(&["--top_k", "many"], 2, "many");
    refused(&["--output", "nowhere/x"], 1, "cannot write nowhere/x: No such file");
    refused(&["--output", path.to_str().unwrap()], 1, "Is a directory");
    refused(&["--device", "abacus"], 2, "abacus");
    refused(&["--weights", "int7"], 2, "possible values: f32, bf16, int8");
    refused(&["--interactive", "--output", "x"], 2, "cannot be used with");
    refused(&["--config", "nowhere.yaml"], 2, "nowhere.yaml");
    let other = folder.path().join("other.yaml");
    let yaml = "model: {vocab_size: 256, pad_token_id: null, d_model: 32, n_heads: 2, n_layers: 2, d_ff: 32}";
    std::fs::write(&other, yaml).unwrap();
    refused(&["--config", other.to_str().unwrap()], 1, "`wte.weight` has shape [256, 16]");
    let weights = path.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refused(&[], 1, "not a whole safetensors file");
    std::fs::write(&weights, [0xff; 64]).unwrap();
    refused(&[], 1, "not a whole safetensors file");
    std::fs::remove_file(&weights).unwrap();
    refused(&[], 1, "model.safetensors");
    std::fs::remove_dir_all(&path).unwrap();
    refused(&[], 1, "there is no such folder");
}

#[test]
fn the_loop_reads_lines_from_a_pipe() {
    let (_folder, path) = checkpoint();
    let mut child = command(&path)
        .args(["--interactive", "--max_new_tokens", "4", "--temperature", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = b"/set temperature 0.5\nabc\n\n/nonsense\n/set top_p 7\n//slash\nquit\nnever read\n";
    child.stdin.take().unwrap().write_all(lines).unwrap();
    let text = text_of(&child.wait_with_output().unwrap());
    let expected = ["temperature 0.5, top_k 50", "abc", "unknown command /nonsense", "top_p = 7", "/slash"];
    let mut rest = text.as_str();
    for part in expected {
        let at = rest.find(part).unwrap_or_else(|| panic!("{part} is missing in {text:?}"));
        rest = &rest[at + part.len()..];
    }
    assert!(!text.contains("never") && !text.contains('\u{1b}'));
}

/// A conversation whose settings are kept beside the checkpoint, before its first line.
fn begun(checkpoint: &Path, args: &[&str]) -> PtySession {
    let mut command = command(checkpoint);
    command.arg("--interactive").args(args);
    command.env("TERM", "xterm").env("XDG_CONFIG_HOME", checkpoint.with_file_name("settings"));
    rexpect::session::spawn_command(command, Some(WATCHDOG_MS)).unwrap()
}

/// As [`begun`], once it waits for a prompt.
fn terminal(checkpoint: &Path, args: &[&str]) -> PtySession {
    let mut session = begun(checkpoint, args);
    session.exp_string("/help shows").unwrap();
    session.exp_string("> ").unwrap();
    session
}

#[test]
fn a_conversation_at_a_terminal() {
    let (_folder, path) = checkpoint();
    let mut session = terminal(&path, &["--max_new_tokens", "8", "--temperature", "0.5"]);
    session.send_line("/help").unwrap();
    session.exp_string("/set NAME VALUE").unwrap();
    session.exp_string("> ").unwrap();
    session.send_line("/set temperature 0.7").unwrap();
    session
        .exp_string("temperature 0.7, top_k 50, top_p 0.9, min_p 0, repetition_penalty 1, max_new_tokens 8")
        .unwrap();
    session.send_line("Hello").unwrap();
    session.exp_string("\nHello").unwrap();
    session.exp_string("> ").unwrap();
    // Line editing: the cursor goes back over the l and a letter is put in.
    session.send("/setings\x1b[D\x1b[D\x1b[D\x1b[Dt").unwrap();
    session.send_line("").unwrap();
    session.exp_string("temperature 0.7").unwrap();
    // History: up twice is `Hello` again.
    session.send("\x1b[A\x1b[A").unwrap();
    session.send_line("").unwrap();
    session.exp_string("\nHello").unwrap();
    session.exp_string("> ").unwrap();
    // Ctrl-C at the prompt does not end it, Ctrl-D does.
    session.send_control('c').unwrap();
    session.exp_string("(Ctrl-D or quit ends)").unwrap();
    session.exp_string("> ").unwrap();
    session.send_control('d').unwrap();
    session.exp_eof().unwrap();
    let status = session.process().wait().unwrap();
    assert_eq!(format!("{status:?}").split('(').next(), Some("Exited"), "{status:?}");
}

#[test]
fn ctrl_c_stops_the_reply_and_not_the_program() {
    let (_folder, path) = checkpoint();
    let mut session = terminal(&path, &["--max_new_tokens", "100000000", "--temperature", "0.5"]);
    session.send_line("Hello").unwrap();
    session.exp_string("\nHello").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    session.send_control('c').unwrap();
    session.exp_string("(stopped)").unwrap();
    session.exp_string("> ").unwrap();
    session.send_line("/settings").unwrap();
    session.exp_string("temperature 0.5").unwrap();
    session.exp_string("> ").unwrap();
    session.send_line("quit").unwrap();
    session.exp_eof().unwrap();
}

#[test]
fn changed_settings_are_there_the_next_time_but_flags_win() {
    let (_folder, path) = checkpoint();
    let mut session = terminal(&path, &[]);
    for (change, shown) in [("/set top_k 7", "top_k 7"), ("/set min-p 0.25", "min_p 0.25"), ("/set stop \\n", "stop [")]
    {
        session.send_line(change).unwrap();
        session.exp_string(shown).unwrap();
        session.exp_string("> ").unwrap();
    }
    session.send_line("q").unwrap();
    session.exp_eof().unwrap();
    let mut session = terminal(&path, &["--min_p", "0.125"]);
    session.send_line("/settings").unwrap();
    session.exp_string("top_k 7, top_p 0.9, min_p 0.125").unwrap();
    session.exp_string("> ").unwrap();
    session.send_line("q").unwrap();
    session.exp_eof().unwrap();
}

#[test]
fn a_bad_file_of_kept_settings_is_named() {
    let (folder, path) = checkpoint();
    let file = folder.path().join("settings/transformer-lm/generate.json");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    for (text, message) in [("{\"colour\":\"1\"}", "no setting is called colour"), ("{\"top_p\":\"7\"}", "top_p = 7")] {
        std::fs::write(&file, text).unwrap();
        let mut session = begun(&path, &[]);
        session.exp_string(&format!("error: {}: {message}", file.display())).unwrap();
        session.exp_string("mend or remove it").unwrap();
        session.exp_eof().unwrap();
    }
}

#[test]
fn a_text_is_saved_where_there_is_one_and_replaces_a_file_only_when_told() {
    let (folder, path) = checkpoint();
    let file = folder.path().join("text.txt");
    let content = || std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, "precious").unwrap();
    let name = file.display();
    let text = converse(&path, &format!("/save {name}\n/save! {name}\n/save {name}.new\n"));
    assert_eq!(text.matches("there is no text to save yet").count(), 3, "{text}");
    assert!(content() == "precious" && !folder.path().join("text.txt.new").exists());
    let text = converse(&path, &format!("abc\n/save {name}\n"));
    assert!(text.contains(&format!("{name} is there already; /save! {name} replaces it")), "{text}");
    assert_eq!(content(), "precious");
    let text = converse(&path, &format!("abc\n/save! {name}\n/stats\n"));
    assert!(text.contains("\n1 reply: 6 tokens in"), "{text}");
    assert!(text.contains("bytes in") && content().starts_with("abc"), "{text}");
}

fn converse(checkpoint: &Path, input: &str) -> String {
    let mut child = command(checkpoint)
        .args(["--interactive", "--max_new_tokens", "6"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    text_of(&child.wait_with_output().unwrap())
}

#[test]
fn prompts_may_have_several_lines_and_come_from_files() {
    let (folder, path) = checkpoint();
    let (from, to) = (folder.path().join("from.txt"), folder.path().join("to.txt"));
    std::fs::write(&from, "loaded\ntext").unwrap();
    let (from, into) = (from.display(), to.display());
    let text =
        converse(&path, &format!("one\\\ntwo\n/load {from}\n/save {into}\n/stats\n\"\"\"\nq\n\"\"\"\n/load /none\n"));
    let mut rest = text.as_str();
    for part in [
        "one\ntwo",
        "loaded\ntext",
        "bytes in",
        "last reply: 6 tokens in",
        "2 replies: 12 tokens in",
        "q",
        "cannot read /none",
    ] {
        let at = rest.find(part).unwrap_or_else(|| panic!("{part} is missing in {text:?}"));
        rest = &rest[at + part.len()..];
    }
    let saved = std::fs::read_to_string(to).unwrap();
    assert!(saved.starts_with("loaded\ntext") && saved.len() > 11 && text.contains(&saved));
}

#[test]
fn a_text_can_come_from_a_file_and_end_early() {
    let (folder, path) = checkpoint();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "abc\n").unwrap();
    let whole = text_of(&run(&path, &["--prompt", "abc", "--max_new_tokens", "60"]));
    assert_eq!(text_of(&run(&path, &["--prompt-file", file.to_str().unwrap(), "--max_new_tokens", "60"])), whole);
    let mut child = command(&path)
        .args(["--prompt-file", "-", "--max_new_tokens", "60"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"abc\n").unwrap();
    assert_eq!(text_of(&child.wait_with_output().unwrap()), whole);

    let added = &whole[3..];
    let stop = added.chars().nth(20).unwrap().to_string();
    let expected = format!("abc{}\n", &added[..added.find(&stop).unwrap()]);
    let args = ["--prompt", "abc", "--max_new_tokens", "60", "--stop", "no such text", "--stop", &stop];
    assert_eq!(text_of(&run(&path, &args)), expected);
}

#[test]
fn weights_can_be_read_in_fewer_bytes() {
    let (_folder, path) = checkpoint();
    let text =
        |weights| text_of(&run(&path, &["--prompt", "abc", "--max-new-tokens", "9", "--greedy", "--weights", weights]));
    for weights in ["f32", "bf16", "int8"] {
        let written = text(weights);
        assert!(written.starts_with("abc") && written.chars().count() > 9, "{weights}: {written}");
        assert_eq!(written, text(weights));
    }
}

#[test]
fn json_has_a_line_for_each_sample() {
    let (_folder, path) = checkpoint();
    let args = ["--prompt", "abc", "--num-samples", "3", "--max-new-tokens", "7", "--json"];
    let lines = text_of(&run(&path, &args));
    let samples: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(samples.len(), 3);
    for (sample, number) in samples.iter().zip(1..) {
        assert_eq!((&sample["sample"], &sample["prompt"]), (&number.into(), &"abc".into()));
        assert_eq!((&sample["tokens"], &sample["ending"]), (&7.into(), &"length".into()));
    }
    let greedy = |seed| {
        text_of(&run(&path, &["--greedy", "--seed", seed, "--max-new-tokens", "20", "--repetition-penalty", "1.3"]))
    };
    assert_eq!(greedy("1"), greedy("2"));
    assert_ne!(
        greedy("1"),
        text_of(&run(&path, &["--greedy", "--max-new-tokens", "20"])),
        "the penalty changes nothing"
    );
}
