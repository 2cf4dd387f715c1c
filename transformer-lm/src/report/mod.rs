//! The curves of one or several runs, as one HTML page that needs no network, and as a PNG.

mod canvas;
mod chart;
mod page;
mod run;

use std::path::{Path, PathBuf};

use crate::checkpoint::write_atomically;
use crate::{Error, Result};

use canvas::{Png, Svg};
use run::Run;

/// Reads the runs in `folders` and draws them into `html` and, beside it, a file of the same name that ends with `.png`;
/// gives the latter's path.
///
/// # Errors
/// A folder without metrics, or whose metrics are damaged; files that cannot be written.
pub fn report(folders: &[PathBuf], html: &Path) -> Result<PathBuf> {
    let picture = html.with_extension("png");
    if picture == html {
        let text = format!("--output {}: the picture has this name; expected one that ends with .html", html.display());
        return Err(Error::Config(text));
    }
    let runs: Vec<Run> = folders.iter().map(|folder| Run::read(folder)).collect::<Result<_>>()?;
    if let Some((folder, _)) = folders.iter().zip(&runs).find(|(_, run)| !chart::draws(run)) {
        return Err(Error::data(folder, "its metrics hold no figures to draw; has an update been logged?"));
    }
    let (width, height) = chart::size(&runs);
    let mut svg = Svg::new(width, height);
    chart::draw(&runs, &mut svg);
    write_atomically(html, page::html(&runs, &svg.finish()).as_bytes())?;
    let too_large = || Error::Training(format!("a picture of {width} x {height} is too large"));
    let mut png = Png::new(width, height).ok_or_else(too_large)?;
    chart::draw(&runs, &mut png);
    let bytes = png.finish().map_err(|error| Error::io("write", &picture)(std::io::Error::other(error)))?;
    write_atomically(&picture, &bytes)?;
    Ok(picture)
}
