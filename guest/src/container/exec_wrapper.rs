//! `AWS_LAMBDA_EXEC_WRAPPER`: a script of the function's that starts its runtime (AWS Lambda Developer Guide, "Modifying the
//! runtime environment"). It is called with the runtime's own command line, which it runs at its end.

use super::{Function, Runtime};

/// Names the script.
const VARIABLE: &str = "AWS_LAMBDA_EXEC_WRAPPER";
/// A shell runs scripts without `#!` too, and tells what is wrong as Lambda does: in the log, and by exit status 127 where
/// there is no such file, 126 where it cannot be run. The word after it names the shell in its messages.
const SHELL: [&str; 4] = ["/bin/sh", "-c", r#"exec "$AWS_LAMBDA_EXEC_WRAPPER" "$@""#, VARIABLE];

/// What runs in the container to start the runtime by `command`.
pub(super) fn wrapped<'a>(function: &Function, command: &[&'a str]) -> Vec<&'a str> {
    let set = function.environment.get(VARIABLE).is_some_and(|path| !path.is_empty());
    // Lambda takes no notice of it for runtimes that are the function's own.
    if set && function.runtime == Runtime::Python311 {
        [SHELL.as_slice(), command].concat()
    } else {
        command.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::{Command, Output};

    use super::*;
    use crate::container::tests::function;

    fn with_wrapper(runtime: Runtime, path: &str) -> Function {
        let mut function = function(runtime);
        function.environment.insert(VARIABLE.to_owned(), path.to_owned());
        function
    }

    /// What becomes of the runtime `/bin/echo runtime` where the wrapper is a file of this content and these permissions.
    fn run(content: &str, mode: u32) -> Output {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wrapper");
        if mode > 0 {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = path.to_str().unwrap();
        let function = with_wrapper(Runtime::Python311, path);
        let command = wrapped(&function, &["/bin/echo", "runtime", "a b"]);
        let (program, arguments) = command.split_first().unwrap();
        Command::new(program)
            .args(arguments)
            .env_clear()
            .env(VARIABLE, path)
            .output()
            .unwrap()
    }

    #[test]
    fn starts_a_runtime_of_ours_and_no_other() {
        let command = || vec!["/runtime", "handler"];
        for (runtime, path) in [(Runtime::Python311, ""), (Runtime::Provided, "/var/task/wrapper")] {
            assert_eq!(wrapped(&with_wrapper(runtime, path), &command()), command());
        }
        assert_eq!(wrapped(&function(Runtime::Python311), &command()), command());
    }

    #[test]
    fn is_given_the_runtimes_command_line() {
        for first_line in ["#!/bin/sh\n", ""] {
            let ran = run(&format!("{first_line}echo wrapper of $#\nexec \"$@\"\n"), 0o755);
            assert_eq!(ran.status.code(), Some(0));
            assert_eq!(String::from_utf8_lossy(&ran.stdout), "wrapper of 3\nruntime a b\n");
        }
        assert_eq!(run("#!/bin/sh\nexit 41\n", 0o755).status.code(), Some(41));
    }

    #[test]
    fn says_why_it_cannot_be_run() {
        for (mode, status) in [(0, 127), (0o644, 126)] {
            let ran = run("#!/bin/sh\n", mode);
            assert_eq!(ran.status.code(), Some(status));
            let told = String::from_utf8_lossy(&ran.stderr);
            assert!(told.contains(VARIABLE) && told.contains("/wrapper"), "{told}");
        }
    }
}
