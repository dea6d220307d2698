//! The `Machines` service.
