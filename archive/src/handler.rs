//! What a runtime starts, and whether a function's zip or one of its layers has it.

use stoker_proto::runtimes;

use crate::tree::{Found, Node, Tree};

/// Why a runtime could not start what a zip holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandlerError {
    /// No module of that name.
    #[error("neither the zip nor a layer has a module for the handler {handler:?}: {expected:?} is missing")]
    NoModule {
        /// As given.
        handler: String,
        /// The file that would usually be there.
        expected: String,
    },
    /// No `bootstrap` at the root.
    #[error(
        "neither the zip nor a layer has an executable `bootstrap` at its root, which the runtime `provided` starts"
    )]
    NoBootstrap,
    /// A `bootstrap` without the permission to execute.
    #[error("`bootstrap` is not executable; set its mode to 0755 before zipping")]
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

/// Folders of a layer that Python looks for modules in.
const LAYER_FOLDERS: [&str; 2] = ["python/lib/python3.11/site-packages/", "python/"];

/// Whether what the runtime starts is in the function's own zip or in one of its layers, of which later ones lie over
/// earlier ones. A link that leads out of its zip is taken to lead to what is needed.
pub(crate) fn check(code: &Tree, layers: &[&Tree], runtime: &str, handler: &str) -> Result<(), HandlerError> {
    if runtime == runtimes::PROVIDED {
        let all = std::iter::once(&code).chain(layers.iter().rev());
        // The first that there is is started, whether it can be or not.
        let mut found = all.filter_map(|tree| match tree.resolve("bootstrap") {
            Found::Here(Node::File { executable }) => Some(*executable),
            Found::Elsewhere => Some(true),
            _ => None,
        });
        return match found.next() {
            Some(true) => Ok(()),
            Some(false) => Err(HandlerError::NotExecutable),
            None => Err(HandlerError::NoBootstrap),
        };
    }
    // As awslambdaric finds it: what is before the last dot is the module, `/` in it is as good as `.`.
    let module = handler
        .rsplit_once('.')
        .map_or(handler, |(module, _)| module)
        .replace('.', "/");
    let may_be = |tree: &Tree, folder: &str| {
        MODULE_SUFFIXES.iter().any(|suffix| {
            let found = tree.resolve(&format!("{folder}{module}{suffix}"));
            matches!(found, Found::Here(Node::File { .. }) | Found::Elsewhere)
        })
    };
    let in_layer = |tree: &&Tree| LAYER_FOLDERS.iter().any(|folder| may_be(tree, folder));
    if may_be(code, "") || layers.iter().any(in_layer) {
        Ok(())
    } else {
        Err(HandlerError::NoModule {
            handler: handler.to_owned(),
            expected: format!("{module}.py"),
        })
    }
}
