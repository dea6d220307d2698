//! Checks a zip before it is kept.
