//! What a runtime starts, and whether a zip has it.

use stoker_proto::runtimes;

use crate::tree::{Found, Node, Tree};

/// Why a runtime could not start what a zip holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandlerError {
    /// No module of that name.
    #[error("the zip has no module for the handler {handler:?}: {expected:?} is missing")]
    NoModule {
        /// As given.
        handler: String,
        /// The file that would usually be there.
        expected: String,
    },
    /// No `bootstrap` at the root.
    #[error("the zip has no executable `bootstrap` at its root, which the runtime `provided` starts")]
    NoBootstrap,
    /// A `bootstrap` without the permission to execute.
    #[error("`bootstrap` in the zip is not executable; set its mode to 0755 before zipping")]
    NotExecutable,
}

/// The files that can be a Python module, after its name.
const MODULE_SUFFIXES: [&str; 7] = [
    ".py",
    "/__init__.py",
    ".pyc",
    "/__init__.pyc",
    ".so",
    ".abi3.so",
    ".cpython-311-x86_64-linux-gnu.so",
];

pub(crate) fn check(tree: &Tree, runtime: &str, handler: &str) -> Result<(), HandlerError> {
    if runtime == runtimes::PROVIDED {
        return match tree.resolve("bootstrap") {
            Found::Here(Node::File { executable: true }) | Found::Elsewhere => Ok(()),
            Found::Here(Node::File { executable: false }) => Err(HandlerError::NotExecutable),
            _ => Err(HandlerError::NoBootstrap),
        };
    }
    // As awslambdaric finds it: what is before the last dot is the module, `/` in it is as good as `.`.
    let module = handler
        .rsplit_once('.')
        .map_or(handler, |(module, _)| module)
        .replace('.', "/");
    let may_be = |path: &str| {
        let found = tree.resolve(path);
        matches!(found, Found::Here(Node::File { .. }) | Found::Elsewhere)
    };
    if MODULE_SUFFIXES
        .iter()
        .any(|suffix| may_be(&format!("{module}{suffix}")))
    {
        Ok(())
    } else {
        Err(HandlerError::NoModule {
            handler: handler.to_owned(),
            expected: format!("{module}.py"),
        })
    }
}
