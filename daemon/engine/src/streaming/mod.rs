//! Named byte streams between clients and engines.
