//! What comes in: the gRPC services and how they are served.

pub mod functions;
pub mod invocations;
pub mod machines;
pub mod telemetry;
