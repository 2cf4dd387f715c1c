//! `docs/CONFIGURATION.md` and the code name the same variables, with the same defaults.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hvd_core::config::{AGREED, Config, IGNORED, KNOBS, OTHERS};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The cells of every row of the document's tables whose first cell is a variable, without back quotes.
fn rows() -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join("docs/CONFIGURATION.md")).expect("the document");
    let rows = text.lines().filter(|line| line.starts_with("| `H"));
    let cells = |row: &str| row.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect();
    rows.map(cells).collect()
}

#[test]
fn every_setting_stands_in_the_document_as_it_is() {
    let documented: Vec<_> = rows().into_iter().filter(|row| row.len() == 4).map(|row| row[..3].to_vec()).collect();
    let defaults = Config::default();
    let row = |knob: &hvd_core::config::Knob| {
        [knob.name, knob.horovod.unwrap_or(""), &(knob.show)(&defaults)].map(str::to_string).to_vec()
    };
    assert_eq!(documented, KNOBS.iter().map(row).collect::<Vec<_>>());
}

#[test]
fn every_other_variable_stands_in_the_document() {
    let documented: Vec<_> = rows().into_iter().filter(|row| row.len() == 2).collect();
    let others = OTHERS.iter().map(|name| name.to_string());
    let ignored = IGNORED.iter().map(|(name, _)| name.to_string());
    assert_eq!(
        documented.iter().map(|row| row[0].clone()).collect::<Vec<_>>(),
        others.chain(ignored).collect::<Vec<_>>()
    );
    for ((_, why), row) in IGNORED.iter().zip(&documented[OTHERS.len()..]) {
        assert_eq!(row[1], *why);
    }
}

/// The variables that a source file has as string literals of their own, which is how one reads them.
fn literals(file: &Path, found: &mut BTreeSet<String>) {
    let text = std::fs::read_to_string(file).expect("a source file");
    let names = text.split('"').filter(|part| part.starts_with("HVD_") || part.starts_with("HOROVOD_"));
    let whole =
        |part: &&str| part.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
    found.extend(names.filter(whole).filter(|name| !name.ends_with('_')).map(str::to_string));
}

fn sources(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a source folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            literals(&path, found);
        }
    }
}

#[test]
fn no_source_file_reads_a_variable_that_is_not_documented() {
    let mut found = BTreeSet::new();
    for package in ["hvd-core", "hvd-core/mpi", "hvd-core/tools", "hvd-torch", "transformer-lm"] {
        let folder = root().join(package).join("src");
        if folder.exists() {
            sources(&folder, &mut found);
        }
    }
    let documented: BTreeSet<String> = rows().into_iter().flat_map(|row| row[..row.len().min(2)].to_vec()).collect();
    // A misspelt name that a test has on purpose.
    found.remove("HVD_FUSION_TRESHOLD");
    let missing: Vec<_> = found.difference(&documented).collect();
    assert!(missing.is_empty(), "docs/CONFIGURATION.md lacks {missing:?}");
    assert!(found.len() > KNOBS.len(), "the sources were not found");
}

#[test]
fn the_document_says_what_must_be_the_same_on_all_ranks() {
    let said = rows().into_iter().filter(|row| row.len() == 4 && row[3].ends_with("Same on all ranks"));
    assert_eq!(said.map(|row| row[0].clone()).collect::<Vec<_>>(), AGREED);
}
