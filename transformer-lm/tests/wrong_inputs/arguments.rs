//! Command lines.

use std::fs;
use std::path::Path;

use super::lab::{Lab, RUN, run};

#[test]
fn arguments_of_train() {
    let mut lab = Lab::new();
    let cases = [
        ("--resume", 2, "a value is required for '--resume <PATH|auto>'"),
        (
            "--resume nowhere",
            1,
            "checkpoint nowhere: there is no such folder\nhint: --resume takes a checkpoint's folder or auto",
        ),
        ("--resume text.txt", 1, "checkpoint text.txt: there is no such folder"),
        ("--resume data", 1, "no checkpoint here: state.json is missing"),
        ("--run_name ''", 2, "run name \"\": expected 1 to 200 characters without `/`"),
        ("--run_name a/b", 2, "run name \"a/b\": expected 1 to 200 characters"),
        ("--output_dir text.txt", 1, "cannot create text.txt: File exists"),
        ("--profile nowhere/x", 1, "writing the timeline nowhere/x: No such file"),
        ("--set", 2, "a value is required for '--set <SECTION.KEY=VALUE>'"),
        ("--nonsense", 2, "unexpected argument '--nonsense' found"),
        ("extra", 2, "unexpected argument 'extra' found"),
        ("--dry-run --resume auto", 2, "cannot be used with '--resume <PATH|auto>'"),
        ("--overfit-one-batch --resume auto", 2, "cannot be used with '--resume <PATH|auto>'"),
        ("--print-config --set model.d_model=7", 2, "does not divide model.d_model = 7"),
    ];
    for (args, code, message) in cases {
        lab.refuses(&format!("train --config config.yaml {args}"), code, message);
    }
    lab.finish();
}

#[test]
fn arguments_of_generate() {
    let mut lab = Lab::new();
    let checkpoint = format!("generate --checkpoint {RUN}");
    let cases = [
        ("--num_samples 0", 2, "invalid value '0' for '--num-samples <N>'"),
        ("--num_samples -1", 2, "invalid value '-1' for '--num-samples <N>'"),
        ("--max_new_tokens -1", 2, "invalid value '-1' for '--max-new-tokens <N>'"),
        ("--top_k -3", 2, "invalid value '-3' for '--top-k <K>'"),
        ("--seed -1", 2, "invalid value '-1' for '--seed <SEED>'"),
        ("--stop ''", 2, "a value is required for '--stop <TEXT>'"),
        ("--max_new_tokens many", 2, "invalid value 'many' for '--max-new-tokens <N>'"),
        ("--temperature -1", 2, "temperature = -1: expected 0 (greedy) or more"),
        ("--temperature nan", 2, "temperature = NaN: expected 0 (greedy) or more"),
        ("--top_p 0", 2, "top_p = 0: expected more than 0, at most 1 (all)"),
        ("--min_p 2", 2, "min_p = 2: expected at least 0 (all), at most 1"),
        ("--repetition_penalty 0", 2, "repetition_penalty = 0: expected more than 0; 1 is none"),
        ("--greedy --temperature 1", 2, "'--greedy' cannot be used with '--temperature <T>'"),
        ("--interactive --prompt x", 2, "'--interactive' cannot be used with '--prompt <PROMPT>'"),
        ("--device cuda:99", 2, "CUDA devices can be used; try --device cpu"),
        ("--device abacus", 2, "`abacus` is none of auto, cpu, cuda, cuda:N"),
        ("--config nowhere.yaml", 2, "cannot read the configuration nowhere.yaml"),
        ("--prompt-file nowhere", 1, "cannot read nowhere: No such file"),
        ("--prompt-file data/train.bin", 1, "cannot read data/train.bin: stream did not contain valid UTF-8"),
        ("--max_new_tokens 2 --output nowhere/x", 1, "cannot write nowhere/x: No such file"),
        ("--max_new_tokens 2 --output data", 1, "cannot write data: Is a directory"),
    ];
    for (args, code, message) in cases {
        lab.refuses(&format!("{checkpoint} {args}"), code, message);
    }
    lab.refuses("generate", 2, "the following required arguments were not provided:\n  --checkpoint <DIR>");
    lab.refuses("generate --checkpoint nowhere", 1, "checkpoint nowhere: there is no such folder");
    lab.refuses("generate --checkpoint data", 1, "checkpoint data: neither a checkpoint nor a run with one");
    lab.finish();
}

#[test]
fn arguments_of_prepare() {
    let mut lab = Lab::new();
    let cases = [
        ("--output o", 2, "the following required arguments were not provided:\n  --input <PATH>..."),
        ("--input text.txt", 2, "the following required arguments were not provided:\n  --output <DIR>"),
        ("--input nowhere.txt --output o", 1, "cannot read nowhere.txt: No such file"),
        ("--input data --output o", 1, "data: no text file here; expected .txt or .jsonl files"),
        ("--input *.md --output o", 1, "*.md: no text file here"),
        ("--input [ --output o", 1, "[: not a pattern"),
        ("--input /dev/null --output o", 1, "/dev/null: neither a file nor a folder"),
        ("--input text.txt --output data", 1, "holds prepared data already; give --overwrite to replace it"),
        ("--input text.txt --output text.txt", 1, "a file is in the way; choose another --output"),
        ("--input text.txt --output runs --overwrite", 1, "holds something else than prepared data"),
        ("--input text.txt --output .", 1, "holds something else than prepared data"),
        ("--input text.txt --output o --val-fraction 1", 2, "--val-fraction 1: expected more than 0, less than 1"),
        ("--input text.txt --output o --val-fraction -1", 2, "--val-fraction -1: expected more than 0, less than 1"),
        ("--input text.txt --output o --tokenizer words", 2, "invalid value 'words' for '--tokenizer <TOKENIZER>'"),
        ("--input text.txt --output o --tokenizer bpe --vocab-size 10", 2, "--vocab-size 10: expected at least 257"),
        ("--input text.txt --output o --tokenizer bpe --vocab-size 99999999999", 2, "and at most 16777216"),
        ("--input text.txt --output o --shard-tokens 0", 2, "--shard-tokens 0: expected at least 1"),
        ("--input text.txt --output o --shard-tokens -1", 2, "invalid value '-1' for '--shard-tokens <N>'"),
        ("--input text.txt --output o --vocab-size 300", 2, "--vocab-size: only --tokenizer bpe has a choice"),
        ("--input text.txt --output o --tokenizer bpe --vocab-size -1", 2, "invalid value '-1' for '--vocab-size <N>'"),
        ("--input text.txt --output o --threads 0", 2, "invalid value '0' for '--threads <N>'"),
        ("--input text.txt --output o --threads -1", 2, "invalid value '-1' for '--threads <N>'"),
        ("--verify --output nowhere", 1, "nowhere: no such folder"),
    ];
    for (args, code, message) in cases {
        lab.refuses(&format!("lm prepare {args}"), code, message);
    }
    lab.finish();
}

#[test]
fn arguments_of_the_other_commands() {
    let mut lab = Lab::new();
    let cases = [
        ("lm", 2, "Usage: lm <COMMAND>"),
        ("lm traim", 2, "unrecognized subcommand 'traim'"),
        ("lm report", 2, "the following required arguments were not provided:\n  <RUN_DIR>..."),
        ("lm report nowhere", 1, "nowhere: neither metrics.jsonl nor metrics.csv here"),
        ("lm report RUN --output data", 1, "cannot write data: Is a directory"),
        ("lm report RUN --output x.png", 2, "--output x.png: the picture has this name"),
        ("lm evaluate --checkpoint nowhere", 1, "checkpoint nowhere: there is no such folder"),
        ("lm evaluate --checkpoint RUN --data nowhere", 1, "nowhere: no such folder"),
        ("lm evaluate --checkpoint RUN --data chars", 1, "chars: made with another tokenizer than the checkpoint's"),
        ("lm evaluate --checkpoint RUN --part test", 2, "invalid value 'test' for '--part <PART>'"),
    ];
    for (line, code, message) in cases {
        lab.refuses(&line.replace("RUN", RUN), code, message);
    }
    let without_data = |folder: &Path| fs::rename(folder.join("data"), folder.join("elsewhere")).unwrap();
    let line = format!("lm evaluate --checkpoint {RUN}");
    lab.refuses_damaged(
        "evaluate without data",
        without_data,
        &line,
        1,
        "hint: the checkpoint's configuration names this",
    );
    for line in ["generate --checkpoint new --max_new_tokens 2", "lm evaluate --checkpoint new"] {
        let message = "checkpoint new: tokenizer.json is missing\nhint: where it was imported without one";
        lab.refuses_damaged("imported without a tokenizer", import_without_tokenizer, line, 1, message);
    }
    // Folders that were made on the way to a name that is too long.
    let line = format!("lm export --checkpoint {RUN} --output new/folder/{}", "x".repeat(250));
    lab.refuses(&line, 1, "File name too long");
    lab.finish();
}

/// Makes the checkpoint `new` of a model of another program, whose tokenizer is not there.
fn import_without_tokenizer(folder: &Path) {
    let done = |line: &str| assert!(run(folder, line).status.success(), "{line}");
    done(&format!("lm export --checkpoint {RUN} --output exported"));
    fs::remove_file(folder.join("exported/tokenizer.json")).unwrap();
    done("lm import --input exported --output new");
}

#[test]
fn a_vocabulary_that_the_text_cannot_fill_is_told() {
    let folder = Lab::new().folder();
    let output = run(folder.path(), "lm prepare --input text.txt --output new --tokenizer bpe --vocab-size 5000");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("note: the text has too few different pairs for the 5000 tokens asked for"), "{output:?}");
    let output = run(folder.path(), "lm prepare --input text.txt --output bpe --tokenizer bpe --vocab-size 260");
    assert!(output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("note"), "{output:?}");
}

#[test]
fn the_printed_configuration_has_what_flags_say() {
    let folder = Lab::new().folder();
    let output =
        run(folder.path(), "train --config config.yaml --print-config --overfit-one-batch --profile trace.json");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("overfit_one_batch: true") && said.contains("profile: trace.json"), "{said}");
}
