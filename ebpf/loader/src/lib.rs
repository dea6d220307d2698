//! Loads the eBPF programs and reads what they counted
