//! hvd-torch
