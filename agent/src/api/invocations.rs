//! The `Invocations` service.
