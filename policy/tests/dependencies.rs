//! The crate stays free of tasks, protocols and I/O.

/// What it may depend on; see DESIGN's layout.
const ALLOWED: &[&str] = &["serde", "stoker-credits", "thiserror", "ulid"];

#[test]
fn nothing_but_data_types_is_depended_on() {
    let manifest = include_str!("../Cargo.toml");
    let (_, dependencies) = manifest.split_once("[dependencies]").unwrap();
    let (dependencies, _) = dependencies.split_once("[dev-dependencies]").unwrap();
    let names: Vec<_> = dependencies
        .lines()
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .collect();
    assert_eq!(names, ALLOWED);
}

#[test]
fn no_file_does_io_or_asks_a_clock() {
    let mut folders = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for word in [
                "std::fs",
                "std::net",
                "std::thread",
                "Instant",
                "SystemTime",
                "Mutex",
                "RandomState",
            ] {
                assert!(!text.contains(word), "{word} in {}", path.display());
            }
            files += 1;
        }
    }
    assert!(files > 10);
}
