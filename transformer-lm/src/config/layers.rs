//! Layers of values, each checked for unknown keys and wrong types before they are merged.

use serde_yaml::{Mapping, Value};

use super::{Config, validate};
use crate::{Error, Result};

/// A tree of values and where it came from.
pub(super) struct Layer {
    source: String,
    value: Value,
}

impl Layer {
    /// A file's text.
    pub fn parse(text: &str, source: &str) -> Result<Layer> {
        let value = serde_yaml::from_str(text).map_err(|e| Error::Config(format!("{source}: not valid YAML: {e}")))?;
        Layer::new(value, source)
    }

    /// A `section.key=value` override.
    pub fn parse_override(text: &str) -> Result<Layer> {
        let source = format!("--set {text}");
        let (path, raw) = text.split_once('=').filter(|(path, _)| !path.trim().is_empty()).ok_or_else(|| {
            Error::Config(format!("{source}: expected section.key=value, for example training.epochs=3"))
        })?;
        let leaf = serde_yaml::from_str(raw).map_err(|e| Error::Config(format!("{source}: not a YAML value: {e}")))?;
        let value = path.trim().rsplit('.').fold(leaf, |inner, key| Value::Mapping(single(key, inner)));
        Layer::new(value, &source)
    }

    /// A tree of values; a section without keys counts as absent.
    pub fn new(value: Value, source: &str) -> Result<Layer> {
        let mapping = match value {
            Value::Null => Mapping::new(),
            Value::Mapping(mapping) => mapping.into_iter().filter(|(_, section)| !section.is_null()).collect(),
            other => {
                let found = show(&other);
                return Err(Error::Config(format!(
                    "{source}: expected sections (model:, training:, …), found {found}"
                )));
            }
        };
        let layer = Layer { source: source.to_string(), value: Value::Mapping(mapping) };
        layer.check()?;
        Ok(layer)
    }

    /// Refuses unknown keys and wrong types.
    fn check(&self) -> Result<()> {
        let known = Config::default().to_dict();
        for (key, section) in entries(&self.value) {
            let name = self.known_key(&known, "", key)?;
            let Some(defaults) = known.get(name).filter(|v| v.is_mapping()) else {
                self.check_type(name, Value::Mapping(single(name, section.clone())), section)?;
                continue;
            };
            if !section.is_mapping() {
                let found = show(section);
                return Err(Error::Config(format!("{}: {name} is a section of keys, found {found}", self.source)));
            }
            for (key, value) in entries(section) {
                let key = self.known_key(defaults, name, key)?;
                let tree = single(name, Value::Mapping(single(key, value.clone())));
                self.check_type(&format!("{name}.{key}"), Value::Mapping(tree), value)?;
            }
        }
        Ok(())
    }

    /// The key as text where `known` has it; otherwise an error with the nearest key.
    fn known_key<'a>(&self, known: &Value, section: &str, key: &'a Value) -> Result<&'a str> {
        let found = key.as_str().map_or_else(|| show(key), String::from);
        if let Some(name) = key.as_str().filter(|name| known.get(name).is_some()) {
            return Ok(name);
        }
        let keys: Vec<&str> = entries(known).filter_map(|(key, _)| key.as_str()).collect();
        let place = if section.is_empty() { String::new() } else { format!("{section}.") };
        let hint = match nearest(&found, &keys) {
            Some(near) => format!("did you mean `{place}{near}`?"),
            None => match home_of(&found) {
                Some(home) => format!("did you mean `{home}`?"),
                None => format!("known keys: {}", keys.join(", ")),
            },
        };
        Err(Error::Config(format!("{}: unknown key `{place}{found}`; {hint}", self.source)))
    }

    fn check_type(&self, path: &str, tree: Value, value: &Value) -> Result<()> {
        match serde_yaml::from_value::<Config>(tree) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Config(validate::wrong_value(&self.source, path, &show(value)))),
        }
    }

    fn names(&self, path: &str) -> bool {
        path.split('.').try_fold(&self.value, |value, key| value.get(key)).is_some()
    }
}

/// Merges the layers over `base` and checks the values of the result.
pub(super) fn build(base: Config, layers: &[Layer]) -> Result<Config> {
    let mut tree = base.to_dict();
    for layer in layers {
        overlay(&mut tree, &layer.value);
    }
    let config: Config = serde_yaml::from_value(tree).map_err(|e| Error::Config(e.to_string()))?;
    let source_of = |path: &str| match layers.iter().rev().find(|layer| layer.names(path)) {
        Some(layer) => layer.source.clone(),
        None => format!("{} (by default)", layers.first().map_or("configuration", |layer| &layer.source)),
    };
    validate::check(&config, source_of)?;
    Ok(config)
}

/// Deep merge: mappings key by key, everything else replaced.
fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Mapping(base), Value::Mapping(over)) => {
            for (key, value) in over {
                match base.get_mut(key) {
                    Some(inner) => overlay(inner, value),
                    None => drop(base.insert(key.clone(), value.clone())),
                }
            }
        }
        (base, over) => *base = over.clone(),
    }
}

fn single(key: &str, value: Value) -> Mapping {
    Mapping::from_iter([(Value::from(key), value)])
}

fn entries(value: &Value) -> impl Iterator<Item = (&Value, &Value)> {
    value.as_mapping().into_iter().flatten()
}

/// Longer values are cut in errors.
const SHOWN_CHARACTERS: usize = 120;

/// A value as a user would write it, on one line.
pub(super) fn show(value: &Value) -> String {
    let text = match value.as_f64().filter(|number| !number.is_finite()) {
        Some(_) => serde_yaml::to_string(value).unwrap_or_default().trim_end().to_string(), // JSON has no such numbers
        None => serde_json::to_string(value).unwrap_or_else(|_| format!("{value:?}")),
    };
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The section of a key that was given in the wrong place: `section.key`.
fn home_of(key: &str) -> Option<String> {
    let known = Config::default().to_dict();
    entries(&known)
        .filter(|(_, section)| section.get(key).is_some())
        .find_map(|(name, _)| name.as_str().map(|name| format!("{name}.{key}")))
}

/// The candidate nearest to `word`, where it is near enough to be a slip of the pen.
fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let (distance, best) = candidates.iter().map(|candidate| (edits(word, candidate), *candidate)).min()?;
    (distance <= 2.max(word.len() / 4)).then_some(best)
}

/// Edit distance: insertions, deletions and replacements.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
