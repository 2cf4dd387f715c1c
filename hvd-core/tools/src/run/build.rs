//! What this build can do.

use hvd_core::capability::{Capability, capabilities};

/// A text for `--check-build`.
pub fn describe() -> String {
    let line = |Capability { name, available, detail }: Capability| {
        format!("    [{}] {name:<5} {detail}\n", if available { 'x' } else { ' ' })
    };
    format!("hvdrun {}\n\n{}", env!("CARGO_PKG_VERSION"), capabilities().into_iter().map(line).collect::<String>())
}
