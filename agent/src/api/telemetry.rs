//! The `Telemetry` service.
