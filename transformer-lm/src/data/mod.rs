//! Tokenizers, token shards and loaders.
