//! Built-in transport over TCP.
