//! The settings of a conversation: by name, and kept from one session to the next.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::TextParams;
use crate::checkpoint::write_atomically;
use crate::{Error, Result};

/// Changes that a user has made, by name; those of flags and the checkpoint are not among them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Settings(BTreeMap<String, String>);

impl Settings {
    /// Reads what [`Settings::write`] wrote; nothing where there is no such file.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else.
    pub(super) fn read(path: &Path) -> Result<Settings> {
        match std::fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Settings::default()),
            Err(error) => Err(Error::io("read", path)(error)),
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(changes) => Ok(Settings(changes)),
                Err(error) => Err(Error::data(path, format!("not a file of settings ({error}); remove it"))),
            },
        }
    }

    /// With one more change.
    pub(super) fn changed(mut self, name: &str, value: &str) -> Settings {
        self.0.insert(name.to_owned(), value.to_owned());
        self
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let text = serde_json::to_string_pretty(&self.0).map_err(|error| Error::data(path, error.to_string()))?;
        write_atomically(path, format!("{text}\n").as_bytes())
    }

    /// `params` with these changes.
    ///
    /// # Errors
    /// A change that is none.
    pub(super) fn over(&self, params: &TextParams) -> Result<TextParams> {
        self.0.iter().try_fold(params.clone(), |params, (name, value)| with(&params, name, value))
    }
}

/// Where the settings of this user are kept: `transformer-lm/generate.json` in `XDG_CONFIG_HOME` or `~/.config`.
pub(super) fn file_of_user() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")))?;
    Some(folder.join("transformer-lm").join("generate.json"))
}

/// `params` with another value of one setting.
///
/// # Errors
/// A setting that does not exist, a value that makes no sense.
pub(super) fn with(params: &TextParams, name: &str, value: &str) -> Result<TextParams> {
    let mut params = params.clone();
    let sampling = &mut params.sampling;
    match name {
        "temperature" => sampling.temperature = parse(name, value)?,
        "top_k" => sampling.top_k = parse(name, value)?,
        "top_p" => sampling.top_p = parse(name, value)?,
        "min_p" => sampling.min_p = parse(name, value)?,
        "repetition_penalty" => sampling.repetition_penalty = parse(name, value)?,
        "max_new_tokens" => params.max_new_tokens = parse(name, value)?,
        "seed" => params.seed = parse(name, value)?,
        "stop" if value == "none" => params.stop.clear(),
        "stop" => params.stop = vec![value.replace("\\n", "\n")],
        _ => return Err(Error::Config(format!("no setting is called {name}; /settings lists them"))),
    }
    params.sampling.validate()?;
    Ok(params)
}

fn parse<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| Error::Config(format!("{name} cannot be {value:?}; expected a number")))
}

/// All settings on a line.
pub(super) fn describe(params: &TextParams) -> String {
    let TextParams { max_new_tokens, sampling, stop, seed } = params;
    let stop = if stop.is_empty() { "none".to_owned() } else { format!("{stop:?}") };
    format!(
        "temperature {}, top_k {}, top_p {}, min_p {}, repetition_penalty {}, max_new_tokens {max_new_tokens}, stop {stop}, \
         seed {seed}\n",
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_kept_and_applied() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/settings.json");
        assert_eq!(Settings::read(&path).unwrap(), Settings::default());
        let changes = Settings::default().changed("top_k", "7").changed("stop", "a\\nb").changed("top_k", "8");
        changes.write(&path).unwrap();
        let params = Settings::read(&path).unwrap().over(&TextParams::default()).unwrap();
        assert_eq!((params.sampling.top_k, params.stop.as_slice()), (8, &["a\nb".to_string()][..]));
        assert_eq!(params.max_new_tokens, 100);
        std::fs::write(&path, "[").unwrap();
        assert!(Settings::read(&path).unwrap_err().to_string().contains("not a file of settings"));
    }

    #[test]
    fn wrong_changes_are_refused() {
        for (name, value, message) in [
            ("colour", "red", "no setting is called colour"),
            ("top_k", "-1", "top_k cannot be \"-1\""),
            ("min_p", "2", "min_p = 2"),
            ("repetition_penalty", "0", "repetition_penalty = 0"),
        ] {
            let error = with(&TextParams::default(), name, value).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
