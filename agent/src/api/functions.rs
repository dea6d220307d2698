//! The `Functions` service.
