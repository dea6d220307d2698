#![no_std]
//! Plain types that the eBPF programs share with user space.
