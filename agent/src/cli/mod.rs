//! `stoker`, the command line.
