//! The virtual machine monitor: boots one microVM a process
