//! What machines and containers use, as eBPF counts it.
