//! Managed mount activations.
