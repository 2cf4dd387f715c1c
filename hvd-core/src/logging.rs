//! Where warnings go in a program that has no logging of its own.

use tracing::level_filters::LevelFilter;

use crate::config::{Config, LogLevel};

/// Logs to stderr as `config` says, unless the program has installed a `tracing` subscriber.
pub fn to_stderr(config: &Config) {
    let level = match config.log_level {
        LogLevel::Trace => LevelFilter::TRACE,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Off => LevelFilter::OFF,
    };
    let logs = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_max_level(level);
    let installed = match config.log_hide_time {
        true => tracing::subscriber::set_global_default(logs.without_time().finish()),
        false => tracing::subscriber::set_global_default(logs.finish()),
    };
    // An error means that the program has its own.
    drop(installed);
}
