//! What the other commands need, made step by step in the cache folder.
//!
//! A [`Step`] says what it makes, from what, and how. A step whose stamp agrees with its inputs and outputs is skipped;
//! any other is made in a work folder, moved into place, and stamped last ([`stamp`]). While it is made, the time is shown that
//! is left of all that the command has to make ([`left`]).

pub(crate) mod apt;
pub(crate) mod left;
pub(crate) mod stamp;
pub(crate) mod tools;
mod work;

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    build::Profile,
    cache::{self, Cache},
    demo, image, kernel, lab, process,
    setup::stamp::State,
};
pub(crate) use work::Work;

/// One thing that setup makes.
pub(crate) struct Step {
    /// Its stamp's and log's name.
    pub(crate) name: &'static str,
    /// What it makes, for people.
    pub(crate) says: &'static str,
    /// What it takes on 2 CPUs with nothing else to do, in s: to be compared with other steps'.
    pub(crate) seconds: u64,
    /// Steps that come before.
    pub(crate) needs: &'static [&'static Step],
    /// Debian packages that must be installed on this machine to make it.
    pub(crate) packages: &'static [&'static str],
    /// Debian packages, also of later suites, that it is made from; their versions are part of its inputs.
    pub(crate) debs: &'static [&'static str],
    /// Whether it takes root, beside what installing packages takes.
    pub(crate) as_root: bool,
    /// What it makes: files and folders, relative to the cache folder or absolute.
    pub(crate) outputs: &'static [&'static str],
    /// All else that goes into it, in any form.
    pub(crate) inputs: fn(&Cache) -> Result<String>,
    /// Makes each output at [`Work::out`].
    pub(crate) make: fn(&Work<'_>) -> Result<()>,
}

impl Step {
    fn stamp(&self, cache: &Cache) -> PathBuf {
        cache.path("stamps").join(format!("{}.json", self.name))
    }

    fn key(&self, cache: &Cache) -> Result<String> {
        let versions = apt::known_versions(cache);
        let mut text = format!("{}\n{}\n", self.name, (self.inputs)(cache)?);
        for deb in self.debs {
            text += &format!("{deb} {}\n", versions.get(*deb).map_or("", String::as_str));
        }
        Ok(stamp::digest(text.as_bytes()))
    }

    fn state(&self, cache: &Cache) -> Result<State> {
        stamp::check(&self.stamp(cache), &self.key(cache)?)
    }

    fn make(&self, cache: &Cache, number: usize, of: usize) -> Result<()> {
        let start = Instant::now();
        left::begin(self.name);
        cache::remove(&self.stamp(cache))?;
        // Taken before: what changes while it is made is not in it.
        let key = self.key(cache)?;
        let work = Work::new(cache, self, number, of)?;
        (self.make)(&work)?;
        let mut outputs = Vec::new();
        let mut size = 0;
        for output in self.outputs {
            let made = work.out(output)?;
            let place = cache.path(output);
            let parent = place
                .parent()
                .with_context(|| format!("{} has no folder", place.display()))?;
            fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
            cache::remove(&place)?;
            fs::rename(&made, &place).with_context(|| format!("move {} to {}", made.display(), place.display()))?;
            size += stamp::size_of(&place);
            outputs.push(place);
        }
        stamp::record(&self.stamp(cache), &key, &outputs)?;
        left::end();
        work.finish(size, start.elapsed())
    }
}

/// All steps there are, beside the demo's functions.
pub(crate) const EVERYTHING: &[&Step] = &[
    &tools::RUST_SRC,
    &tools::CARGO_DENY,
    &tools::CARGO_DEB,
    &lab::QEMU,
    &lab::KERNEL,
    &kernel::TUNED,
    &kernel::STOCK,
    &image::ROOT,
];

/// Makes everything, the parts that are compiled from this checkout included.
pub(crate) fn everything(cache: &Cache, update: bool) -> Result<()> {
    if update {
        let _lock = cache.lock()?;
        apt::require_debian(&[])?;
        apt::update_index(cache)?;
    }
    ensure(cache, &[EVERYTHING, demo::FUNCTIONS].concat())?;
    image::everything(cache, Profile::Release)?;
    eprintln!("everything is in place, in {}", cache.root().display());
    Ok(())
}

/// Makes those of the steps, and of what they need, that are not done. Says so first where there are any.
pub(crate) fn ensure(cache: &Cache, wanted: &[&'static Step]) -> Result<()> {
    let steps = in_order(wanted);
    if due(cache, &steps)?.is_empty() {
        return Ok(());
    }
    // Only now: what is done is used without waiting for anybody.
    let _lock = cache.lock()?;
    let mut todo = due(cache, &steps)?;
    if todo.iter().any(|(step, _)| !step.debs.is_empty()) && apt::index_is_old(cache) {
        apt::require_debian(&packages(&todo))?;
        apt::update_index(cache)?;
        todo = due(cache, &steps)?;
    }
    eprintln!("Setup has to make, in {}:", cache.root().display());
    for (step, reason) in &todo {
        eprintln!("  - {} ({reason})", step.says);
    }
    let missing = apt::missing(&packages(&todo));
    if !missing.is_empty() {
        apt::require_debian(&missing)?;
    }
    // Before anything is built: it would end there.
    if (todo.iter().any(|(step, _)| step.as_root) || !missing.is_empty()) && !process::is_root() {
        bail!("{}", takes_root(&missing));
    }
    apt::install(&missing)?;
    for (step, _) in &todo {
        left::expect(step.name, Duration::from_secs(step.seconds));
    }
    let of = todo.len();
    for (index, (step, _)) in todo.iter().enumerate() {
        step.make(cache, index + 1, of)
            .with_context(|| format!("make {}", step.says))?;
    }
    Ok(())
}

/// What to do where this is not root.
fn takes_root(missing: &[&str]) -> String {
    let how = "this takes root, as running machines does: run it as root, with your PATH, so that cargo is found:\n  \
               sudo env PATH=\"$PATH\" cargo xtask setup";
    if missing.is_empty() {
        return how.to_owned();
    }
    let missing = missing.join(" ");
    format!("{how}\nIt would install these Debian packages, which are missing:\n  {missing}")
}

fn due(cache: &Cache, steps: &[&'static Step]) -> Result<Vec<(&'static Step, String)>> {
    let mut due = Vec::new();
    for step in steps {
        if let State::Due(reason) = step.state(cache)? {
            due.push((*step, reason));
        }
    }
    Ok(due)
}

fn packages(todo: &[(&'static Step, String)]) -> Vec<&'static str> {
    let mut packages: Vec<&str> = todo.iter().flat_map(|(step, _)| step.packages).copied().collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// The steps and all they need, each once, what is needed first.
fn in_order(wanted: &[&'static Step]) -> Vec<&'static Step> {
    fn add(step: &'static Step, order: &mut Vec<&'static Step>) {
        for need in step.needs {
            add(need, order);
        }
        if !order.iter().any(|known| known.name == step.name) {
            order.push(step);
        }
    }
    let mut order = Vec::new();
    for step in wanted {
        add(step, &mut order);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    static FIRST: Step = Step {
        name: "first",
        says: "the first",
        seconds: 1,
        needs: &[],
        packages: &[],
        debs: &[],
        as_root: false,
        outputs: &["a/first"],
        inputs: |cache| Ok(fs::read_to_string(cache.path("input")).unwrap_or_default()),
        make: |work| Ok(fs::write(work.out("a/first")?, "1")?),
    };
    static SECOND: Step = Step {
        name: "second",
        says: "the second",
        seconds: 1,
        needs: &[&FIRST],
        packages: &[],
        debs: &[],
        as_root: false,
        outputs: &["second"],
        inputs: |_| Ok(String::new()),
        make: |work| {
            fs::create_dir(work.out("second")?)?;
            fs::copy(work.cache().path("a/first"), work.out("second")?.join("copy"))?;
            Ok(())
        },
    };
    static FAILING: Step = Step {
        name: "failing",
        says: "what fails",
        seconds: 1,
        needs: &[],
        packages: &[],
        debs: &[],
        as_root: false,
        outputs: &["failing"],
        inputs: |_| Ok(String::new()),
        make: |work| {
            fs::write(work.out("failing")?, "half")?;
            bail!("interrupted")
        },
    };

    fn names(due: &[(&'static Step, String)]) -> Vec<&'static str> {
        due.iter().map(|(step, _)| step.name).collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let order = in_order(&[&SECOND, &FIRST, &SECOND]);
        assert_eq!(
            order.iter().map(|step| step.name).collect::<Vec<_>>(),
            ["first", "second"]
        );
    }

    #[test]
    fn only_what_is_due_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        ensure(&cache, &[&SECOND]).unwrap();
        assert_eq!(fs::read_to_string(cache.path("second/copy")).unwrap(), "1");
        assert!(due(&cache, &[&FIRST, &SECOND]).unwrap().is_empty());

        // An output cut short is made again; the others are left.
        fs::write(cache.path("second/copy"), "").unwrap();
        assert_eq!(names(&due(&cache, &[&FIRST, &SECOND]).unwrap()), ["second"]);
        ensure(&cache, &[&SECOND]).unwrap();
        assert_eq!(fs::read_to_string(cache.path("second/copy")).unwrap(), "1");

        fs::write(cache.path("input"), "new").unwrap();
        assert_eq!(names(&due(&cache, &[&FIRST, &SECOND]).unwrap()), ["first"]);
    }

    #[test]
    fn an_interrupted_step_leaves_nothing_and_is_due() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let error = ensure(&cache, &[&FAILING]).unwrap_err();
        assert_eq!(format!("{error:#}"), "make what fails: interrupted");
        assert!(!cache.path("failing").exists());
        assert_eq!(names(&due(&cache, &[&FAILING]).unwrap()), ["failing"]);
    }
}
