//! Tasks: one actor each, over shims.
