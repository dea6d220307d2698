//! End-to-end tests through the public API, in real microVMs
