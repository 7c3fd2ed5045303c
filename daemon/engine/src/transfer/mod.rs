//! Transfers between typed sources and destinations.
