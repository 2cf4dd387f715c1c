//! `lm report` on runs as they are recorded, cut short, and damaged.

use std::path::{Path, PathBuf};
use std::process::Command;

use transformer_lm::report::report;

/// A run's folder with `updates` rows of a falling loss.
fn run(folder: &Path, name: &str, updates: u64) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir(&path).unwrap();
    let train = |step: u64| {
        let loss = 1.0 + 3.0 / step as f64;
        format!(
            "{{\"phase\":\"train\",\"global_step\":{step},\"loss\":{loss},\"lr\":0.001,\"accuracy\":null,\"throughput\":5e3}}\n"
        )
    };
    let mut text: String = (1..=updates).map(train).collect();
    text += &format!("{{\"phase\":\"val\",\"global_step\":{updates},\"loss\":1.25,\"bits_per_byte\":1.5}}\n");
    text += &format!("{{\"phase\":\"sample\",\"global_step\":{updates},\"text\":\"<king> & queen\"}}\n");
    text += &format!("{{\"phase\":\"train\",\"global_step\":{updates},\"memory_bytes\":209715200}}\n");
    std::fs::write(path.join("metrics.jsonl"), text + "{\"phase\":\"tr").unwrap();
    path
}

#[test]
fn a_page_holds_all_runs_and_needs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let runs = [run(folder.path(), "first", 40), run(folder.path(), "a<b", 3)];
    let page = folder.path().join("page.html");
    let picture = report(&runs, &page).unwrap();
    let html = std::fs::read_to_string(&page).unwrap();
    for part in
        ["first", "a&lt;b", "<td>40</td>", "<td>1.2500</td>", "&lt;king&gt; &amp; queen", "bits per byte", ">200<"]
    {
        assert!(html.contains(part), "{part}");
    }
    // Loss, validation loss, lr, throughput, bits per byte, memory of two runs, each a line; and the legend's lines.
    let lines = |colour: &str| html.matches(&format!("stroke=\"#{colour}\"")).count();
    assert_eq!((lines("0072b2"), lines("d55e00")), (7, 7));
    let longest = html.lines().filter(|line| line.contains("0072b2")).map(|line| line.matches(',').count()).max();
    assert_eq!(longest, Some(40));
    for outside in ["src=", "href=", "@import", "url("] {
        assert!(!html.contains(outside), "{outside}");
    }

    let picture = tiny_skia::Pixmap::load_png(picture).unwrap();
    let has = |rgb: [u8; 3]| picture.pixels().iter().any(|p| [p.red(), p.green(), p.blue()] == rgb);
    assert!(has([0, 114, 178]) && has([213, 94, 0]) && has([255, 255, 255]));
}

#[test]
fn old_runs_have_only_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let csv = "phase,epoch,update,global_step,lr,loss,perplexity,accuracy,throughput,wall_time\n\
               train,1,1,1,0.1,2.5,12.2,,10.0,1.0\ntrain,1,2,2,0.1,2.25,9.5,0.5,10.0,2.0\n";
    std::fs::write(folder.path().join("metrics.csv"), csv).unwrap();
    let page = folder.path().join("report.html");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lm"));
    let output = command.arg("report").arg(folder.path()).arg("--output").arg(&page).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(std::fs::read_to_string(page).unwrap().contains("<td>2.2500</td>"));
}

#[test]
fn what_is_no_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let refusal = || report(&[folder.path().to_path_buf()], &page).unwrap_err().to_string();
    assert!(refusal().contains("neither metrics.jsonl nor metrics.csv"));
    std::fs::write(folder.path().join("metrics.csv"), "a,b\n1,2\n1\n").unwrap();
    assert!(refusal().contains("line 3 is no row"));
    for empty in ["", "a,b\n", "a,b\n1,2\n", "phase,global_step,mood\ntrain,1,2\n"] {
        std::fs::write(folder.path().join("metrics.csv"), empty).unwrap();
        assert!(refusal().contains("its metrics hold no figures to draw"), "{empty}");
    }
    std::fs::write(folder.path().join("metrics.jsonl"), "{}\n{\n").unwrap();
    assert!(refusal().contains("line 2 is no row"));
    assert!(!page.exists());
}
