//! Garbage collection: mark, sweep, schedule.
