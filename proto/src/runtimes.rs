//! The runtimes that functions run on, as they are named in the API and between agent and guest, and where they find a
//! function.

/// Python 3.11 with `awslambdaric`; starts the function's handler.
pub const PYTHON311: &str = "python3.11";
/// No runtime of ours: starts the function's own `bootstrap`.
pub const PROVIDED: &str = "provided";
/// All of them.
pub const ALL: [&str; 2] = [PYTHON311, PROVIDED];
/// Where a function's code is in its container, as on Lambda.
pub const TASK_ROOT: &str = "/var/task";
