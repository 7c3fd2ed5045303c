//! The black-box suite: what a client sees, on ours and on the reference alike.

mod run;
