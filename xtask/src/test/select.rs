//! Which tests `cargo xtask test FILTER...` means.
//!
//! A word that is the name or the folder of a package names it; else one that is the name of a test program names that;
//! any other is a part of a test's path. A test is run where each kind of word that was given has one that names it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{cache::Cache, process, setup::tools};

/// What the workspace has of packages, as `cargo metadata` tells it.
#[derive(Debug, Deserialize)]
pub(super) struct Workspace {
    packages: Vec<Package>,
}

#[derive(Debug, Clone, Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
}

/// A part of a package that cargo builds a program of.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) kind: Vec<String>,
    /// Whether there are tests in it.
    #[serde(default)]
    test: bool,
    /// Whether there may be tests in its documentation.
    #[serde(default)]
    doctest: bool,
}

/// The tests to run.
#[derive(Debug)]
pub(super) struct Selection {
    /// Whether there is no filter.
    pub(super) is_everything: bool,
    packages: Vec<Package>,
    /// Names of test programs; all where there is none.
    programs: Vec<String>,
    /// Parts of tests' paths; all where there is none.
    pub(super) paths: Vec<String>,
}

// === impl Workspace ===

impl Workspace {
    pub(super) fn read(cache: &Cache) -> Result<Self> {
        let mut cargo = tools::cargo(cache);
        let text = process::output(cargo.args(["metadata", "--no-deps", "--format-version=1", "--locked"]))?;
        serde_json::from_str(&text).context("understand cargo's metadata")
    }

    /// What the words mean. `checkout` is the folder that packages' folders are named in.
    pub(super) fn select(self, checkout: &Path, words: &[String]) -> Result<Selection> {
        let is_everything = words.is_empty();
        let (named, words): (Vec<&String>, Vec<&String>) = words
            .iter()
            .partition(|word| self.packages.iter().any(|package| package.is_called(checkout, word)));
        let (programs, paths): (Vec<&String>, Vec<&String>) = words.into_iter().partition(|word| {
            let mut targets = self.packages.iter().flat_map(Package::tested);
            targets.any(|target| target.name == **word)
        });
        let mut packages = self.packages;
        packages.retain(|package| {
            let is_named = named.is_empty() || named.iter().any(|word| package.is_called(checkout, word));
            let has_program = programs.is_empty() || package.tested().any(|target| programs.contains(&&target.name));
            is_named && has_program
        });
        // Only spares compiling what has no such test: which tests there are, the compiled programs tell.
        let mut kept = Vec::new();
        for package in packages {
            if paths.is_empty() || package.mentions(&paths)? {
                kept.push(package);
            }
        }
        if kept.is_empty() && !is_everything {
            bail!("no test matches; `cargo xtask test --help` says what a filter names");
        }
        let owned = |words: Vec<&String>| words.into_iter().cloned().collect();
        Ok(Selection {
            is_everything,
            packages: kept,
            programs: owned(programs),
            paths: owned(paths),
        })
    }
}

// === impl Package ===

impl Package {
    fn folder(&self) -> &Path {
        self.manifest_path.parent().unwrap_or(&self.manifest_path)
    }

    fn is_called(&self, checkout: &Path, word: &str) -> bool {
        self.name == word || self.folder() == checkout.join(word.trim_end_matches('/'))
    }

    fn tested(&self) -> impl Iterator<Item = &Target> {
        self.targets.iter().filter(|target| target.test)
    }

    /// Whether its sources have what the tests' paths end with, one of them at least.
    fn mentions(&self, paths: &[&String]) -> Result<bool> {
        let ends: Vec<&str> = paths
            .iter()
            .filter_map(|path| path.rsplit("::").find(|name| !name.is_empty()))
            .collect();
        let mut folders = vec![self.folder().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let path = entry.with_context(|| format!("list {}", folder.display()))?.path();
                if path.is_dir() {
                    folders.extend((!path.ends_with("target")).then_some(path));
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
                    // A module may be named by its file alone.
                    let name = path.to_string_lossy();
                    if ends.iter().any(|end| text.contains(end) || name.contains(end)) {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }
}

// === impl Selection ===

impl Selection {
    #[cfg(test)]
    pub(super) fn everything() -> Self {
        Self {
            is_everything: true,
            packages: Vec::new(),
            programs: Vec::new(),
            paths: Vec::new(),
        }
    }

    /// Tells cargo to build the tests' programs and no others, as far as it can be told.
    pub(super) fn restrict_build(&self, cargo: &mut Command) {
        if self.is_everything {
            cargo.arg("--workspace");
            return;
        }
        for package in &self.packages {
            cargo.args(["--package", &package.name]);
        }
        if self.programs.is_empty() {
            return;
        }
        for target in self.packages.iter().flat_map(Package::tested) {
            if self.has_program(&target.name) {
                match target.kind.first().map(String::as_str) {
                    Some("bin") => cargo.args(["--bin", &target.name]),
                    Some("test") => cargo.args(["--test", &target.name]),
                    _ => cargo.arg("--lib"),
                };
            }
        }
    }

    /// Has cargo build, of the selected packages, the examples: functions that tests deploy. Where test programs are named, a
    /// build of tests leaves them as they were. None where all is built anyway.
    pub(super) fn examples(&self, mut cargo: Command) -> Option<Command> {
        if self.is_everything || self.programs.is_empty() {
            return None;
        }
        cargo.args(["build", "--examples"]);
        for package in &self.packages {
            cargo.args(["--package", &package.name]);
        }
        Some(cargo)
    }

    pub(super) fn has_program(&self, name: &str) -> bool {
        self.programs.is_empty() || self.programs.iter().any(|program| program == name)
    }

    /// Tells cargo whose documentation's tests to run; false where there are none. They have no paths to filter by.
    pub(super) fn restrict_doc_tests(&self, cargo: &mut Command) -> bool {
        if !self.programs.is_empty() || !self.paths.is_empty() {
            return false;
        }
        if self.is_everything {
            // As the tests were: of some packages cargo would make much of what they are made of anew, with other features.
            cargo.arg("--workspace");
            return true;
        }
        let mut any = false;
        for package in &self.packages {
            if package.targets.iter().any(|target| target.doctest) {
                cargo.args(["--package", &package.name]);
                any = true;
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Result<(Vec<String>, Selection)> {
        let folder = tempfile::tempdir().unwrap();
        let mut packages = String::new();
        for (name, place, test, source) in [
            ("stoker-vmm", "vmm", "lab_boot", "fn it_boots() {}"),
            ("stoker-agent", "agent", "native", "mod zip { fn it_unpacks() {} }"),
        ] {
            let source_folder = folder.path().join(place).join("src");
            fs::create_dir_all(&source_folder).unwrap();
            fs::write(source_folder.join("lib.rs"), source).unwrap();
            let manifest = folder.path().join(place).join("Cargo.toml");
            packages += &format!(
                r#"{{"name":"{name}","manifest_path":"{}","targets":[
                    {{"name":"{place}","kind":["lib"],"test":true,"doctest":true}},
                    {{"name":"build","kind":["custom-build"],"test":false}},
                    {{"name":"{test}","kind":["test"],"test":true}}]}},"#,
                manifest.display()
            );
        }
        let text = format!(r#"{{"packages":[{}]}}"#, packages.trim_end_matches(','));
        let workspace: Workspace = serde_json::from_str(&text).unwrap();
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let selection = workspace.select(folder.path(), &words)?;
        let mut cargo = Command::new("cargo");
        selection.restrict_build(&mut cargo);
        let arguments = cargo
            .get_args()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        Ok((arguments, selection))
    }

    fn built(words: &[&str]) -> String {
        arguments(words).unwrap().0.join(" ")
    }

    #[test]
    fn only_what_is_named_is_built() {
        assert_eq!(built(&[]), "--workspace");
        assert_eq!(built(&["vmm"]), "--package stoker-vmm");
        assert_eq!(
            built(&["stoker-agent", "vmm/"]),
            "--package stoker-vmm --package stoker-agent"
        );
        assert_eq!(built(&["native"]), "--package stoker-agent --test native");
        assert_eq!(built(&["it_boots"]), "--package stoker-vmm");
        assert_eq!(built(&["zip::"]), "--package stoker-agent");
        assert_eq!(
            built(&["agent", "native", "it_unpacks"]),
            "--package stoker-agent --test native"
        );
    }

    #[test]
    fn a_part_of_a_path_is_left_to_the_programs() {
        let (_, selection) = arguments(&["vmm", "it_"]).unwrap();
        assert_eq!(selection.paths, ["it_"]);
        assert!(!selection.restrict_doc_tests(&mut Command::new("cargo")));
        let (_, selection) = arguments(&["vmm"]).unwrap();
        assert!(selection.paths.is_empty() && selection.has_program("lab_boot"));
        assert!(selection.restrict_doc_tests(&mut Command::new("cargo")));
    }

    #[test]
    fn what_matches_nothing_is_an_error() {
        assert!(arguments(&["nonesuch"]).is_err());
        assert!(arguments(&["vmm", "it_unpacks"]).is_err());
        assert!(arguments(&["vmm", "native"]).is_err());
    }
}
