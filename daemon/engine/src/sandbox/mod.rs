//! Sandbox controllers.
