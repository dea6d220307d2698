//! Images that are damaged or made to do harm: each is refused with an error of its own, and nothing is left of it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{fs, slice, time::Duration};

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use stoker_images::{ConfigError, Exceeded, ImageError, LayerError, Limits, TarError};
use support::{Entry, GZIP, INDEX, Layout, MANIFEST, PLAIN, Tar, TestStore, ZSTD, config_of, file_of};

mod support;

/// What is wrong in the only layer of an image.
fn layer_error(tar: Tar) -> LayerError {
    match TestStore::new().refused(Layout::of(&[tar]).path()) {
        ImageError::Layer { number: 1, source } => source,
        other => panic!("{other}"),
    }
}

fn is<T>(error: &T, check: fn(&T) -> bool)
where
    T: std::fmt::Display,
{
    assert!(check(error), "{error}");
}

#[test]
fn paths_that_lead_out_are_refused() {
    for path in ["../x", "a/../../x", "a/..", "..", "/../etc/passwd"] {
        is(&layer_error(Tar::default().file(path, b"")), |error| {
            matches!(error, LayerError::Parent(_))
        });
    }
    // A leading slash is the image's root.
    let store = TestStore::new();
    let (image, _) = store.mounted(&[Tar::default().file("//etc/./passwd", b"")]);
    assert_eq!(image.list(), ["etc d", "etc/passwd f"]);
}

#[test]
fn hard_links_lead_to_files_of_the_image() {
    for target in ["../x", "/../etc/passwd", "a/../../x"] {
        is(&layer_error(Tar::default().hard_link("x", target)), |error| {
            matches!(error, LayerError::HardLinkOut { .. })
        });
    }
    let long = "x".repeat(300);
    for target in ["/etc/passwd", "folder", "x", "", "folder/x/y", &*long] {
        let tar = Tar::default().folder("folder", 0o755).hard_link("x", target);
        is(&layer_error(tar), |error| matches!(error, LayerError::HardLink { .. }));
    }
    // Not by way of a link either: it leads to the image's own.
    let tar = Tar::default().link("etc", "/../../etc").hard_link("x", "etc/passwd");
    is(&layer_error(tar), |error| matches!(error, LayerError::Loop(_)));
}

#[test]
fn links_in_circles_are_not_followed_for_ever() {
    let tar = Tar::default().link("a", "b").link("b", "a").file("a/x", b"");
    is(&layer_error(tar), |error| matches!(error, LayerError::Loop(_)));
    // Each link leads through all others.
    let mut tar = Tar::default().folder("l0", 0o755);
    for number in 1..40 {
        let target = format!("{}l{}", "./../".repeat(500), number - 1);
        tar = tar.link(&format!("l{number}"), &target);
    }
    for number in 0..1000 {
        tar = tar.file(&format!("l39/{number}"), b"");
    }
    is(&TestStore::new().refused(Layout::of(&[tar]).path()), |error| {
        matches!(error, ImageError::Limit(Exceeded::Work))
    });
}

#[test]
fn whiteouts_name_a_file() {
    for name in [".wh.", ".wh..", ".wh...", "a/.wh..."] {
        is(&layer_error(Tar::default().file(name, b"")), |error| {
            matches!(error, LayerError::Whiteout(_))
        });
    }
    // So many of the same great folder that they would take for ever.
    let mut tar = Tar::default();
    for number in 0..2000 {
        tar = tar.file(&format!("d/{number}"), b"");
    }
    for _ in 0..2000 {
        tar = tar.file(".wh.d", b"");
    }
    is(&TestStore::new().refused(Layout::of(&[tar]).path()), |error| {
        matches!(error, ImageError::Limit(Exceeded::Work))
    });
}

#[test]
fn names_that_no_file_system_takes_are_refused() {
    let deep = "d/".repeat(600);
    for path in ["n".repeat(256), "a/".repeat(2048) + "x", deep + "x"] {
        let entry = Entry {
            path: path.as_bytes(),
            ..Entry::default()
        };
        is(&layer_error(Tar::default().entry(&entry)), |error| {
            matches!(error, LayerError::Path(_))
        });
    }
    let nul = Entry {
        path: b"x",
        pax: &[("path", b"a\0b")],
        ..Entry::default()
    };
    is(&layer_error(Tar::default().entry(&nul)), |error| {
        matches!(error, LayerError::Path(_))
    });
    for target in ["", &*"t".repeat(4096)] {
        is(&layer_error(Tar::default().link("x", target)), |error| {
            matches!(error, LayerError::Target(_))
        });
    }
    is(&layer_error(Tar::default().file("./", b"").link("/", "x")), |error| {
        matches!(error, LayerError::Root)
    });
    is(&layer_error(Tar::default().special("x", b'Z')), |error| {
        matches!(error, LayerError::Kind { kind: b'Z', .. })
    });
    let long = vec![0; 70_000];
    let xattr = Entry {
        path: b"x",
        pax: &[("SCHILY.xattr.user.x", &long)],
        ..Entry::default()
    };
    is(&layer_error(Tar::default().entry(&xattr)), |error| {
        matches!(error, LayerError::Xattr(_))
    });
    let sparse = Entry {
        path: b"x",
        pax: &[("GNU.sparse.realsize", b"1099511627776")],
        ..Entry::default()
    };
    is(&layer_error(Tar::default().entry(&sparse)), |error| {
        matches!(error, LayerError::Tar(TarError::Sparse(_)))
    });
}

#[test]
fn limits_hold_for_all_layers_together() {
    let store = TestStore::with(Limits {
        unpacked: 1 << 20,
        size: 16 << 10,
        entries: 50,
        layers: 127,
        names: 2000,
        document: 100_000,
    });
    let refused = |layers: &[(&str, Tar)]| {
        let mut layout = Layout::new();
        let layers: Vec<_> = layers.iter().map(|(kind, tar)| (*kind, tar.clone().finish())).collect();
        let image = layout.image(&layers, json!({}));
        layout.index(&[image]);
        match store.refused(layout.path()) {
            ImageError::Limit(exceeded) => exceeded,
            other => panic!("{other}"),
        }
    };
    let zeros = |size| Tar::default().file("zeros", &vec![0; size]);
    // Of a MiB and more, some KB: a bomb. The second layer alone would be small enough.
    assert_eq!(refused(&[(GZIP, zeros(2 << 20))]), Exceeded::Unpacked(1 << 20));
    assert_eq!(
        refused(&[(ZSTD, zeros(600 << 10)), (GZIP, zeros(600 << 10))]),
        Exceeded::Unpacked(1 << 20)
    );
    // Each takes a block of the image, which is more than of the tar.
    let blocks = (0..4).fold(Tar::default(), |tar, number| tar.file(&number.to_string(), &[7; 2500]));
    assert_eq!(refused(&[(PLAIN, blocks)]), Exceeded::Size(16 << 10));
    let files = |count: usize, name: &str| {
        (0..count).fold(Tar::default(), |tar, number| tar.file(&format!("{name}{number}"), b""))
    };
    assert_eq!(refused(&[(PLAIN, files(51, ""))]), Exceeded::Entries(50));
    assert_eq!(
        refused(&[(PLAIN, files(26, "")), (PLAIN, files(26, ""))]),
        Exceeded::Entries(50)
    );
    // Folders that are only implied.
    assert_eq!(
        refused(&[(PLAIN, Tar::default().file(&"d/".repeat(51), b""))]),
        Exceeded::Entries(50)
    );
    let long = "n".repeat(200);
    assert_eq!(refused(&[(PLAIN, files(10, &long))]), Exceeded::Names(2000));
    let link = Tar::default().link("l", &"t".repeat(2000));
    assert_eq!(refused(&[(PLAIN, link)]), Exceeded::Names(2000));
    let xattr = Entry {
        path: b"x",
        pax: &[("SCHILY.xattr.user.x", &[b'v'; 2000])],
        ..Entry::default()
    };
    assert_eq!(refused(&[(PLAIN, Tar::default().entry(&xattr))]), Exceeded::Names(2000));
    // Of many short ones it is not what they say that takes memory.
    let names: Vec<String> = (0..20).map(|number| format!("SCHILY.xattr.user.{number}")).collect();
    let short: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &b""[..])).collect();
    let xattrs = Entry {
        path: b"x",
        pax: &short,
        ..Entry::default()
    };
    assert_eq!(
        refused(&[(PLAIN, Tar::default().entry(&xattrs))]),
        Exceeded::Names(2000)
    );
    // The same of a tar of a root file system, and of an archive that is a bomb itself.
    let bomb = support::compress(GZIP, &zeros(2 << 20).finish());
    is(&store.refused(file_of(&bomb).path()), |error| {
        matches!(error, ImageError::Limit(Exceeded::Unpacked(_)))
    });
    let count = file_of(&files(51, "").finish());
    is(&store.refused(count.path()), |error| {
        matches!(error, ImageError::Limit(Exceeded::Entries(50)))
    });

    let layers = |count: usize| -> Vec<(&str, Tar)> { vec![(PLAIN, Tar::default().folder("d", 0o755)); count] };
    assert_eq!(refused(&layers(128)), Exceeded::Layers(127));
    assert_eq!(refused(&layers(127)), Exceeded::Entries(50));
    let most = TestStore::new();
    let layers: Vec<Tar> = (0..127)
        .map(|number| Tar::default().file(&format!("{number}"), b"").file("last", &[number]))
        .collect();
    let (image, _) = most.mounted(&layers);
    assert_eq!((image.list().len(), image.read("last")), (128, "\u{7e}".to_owned()));
}

#[test]
fn layers_of_nothing_are_not_read_over_and_over() {
    let store = TestStore::with(Limits {
        unpacked: 8 << 20,
        ..Limits::default()
    });
    // 1.5 MiB of frames with nothing in them, which an archive has once and an image 127 times.
    let frame = support::compress(GZIP, b"");
    let layer = frame.repeat((3 << 19) / frame.len());
    let of = |count: usize| {
        let config = config_of(std::iter::repeat_n(&b""[..], count), &json!({})).to_string();
        let manifest = json!([{"Config": "c", "Layers": vec!["l"; count]}]).to_string();
        let tar = Tar::default()
            .file("c", config.as_bytes())
            .file("l", &layer)
            .file("manifest.json", manifest.as_bytes());
        file_of(&tar.finish())
    };
    is(&store.refused(of(127).path()), |error| {
        matches!(error, ImageError::Limit(Exceeded::Unpacked(_)))
    });
    store.store.import("some", of(4).path(), None).unwrap();
}

/// The CPU time that this thread takes, the least of some times.
fn cpu_time(run: impl Fn()) -> Duration {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    let times = (0..3).map(|_| {
        let begun = now();
        run();
        Duration::from(now() - begun)
    });
    times.min().unwrap()
}

#[test]
fn an_index_of_many_images_takes_little_more_than_to_parse_it() {
    const COUNT: usize = 20_000;
    let store = TestStore::with(Limits::default());
    let layout = Layout::new();
    let manifest = |number: usize| json!({"mediaType": MANIFEST, "digest": format!("sha256:{number:064x}"), "size": 1});
    layout.index(&(0..COUNT).map(manifest).collect::<Vec<_>>());
    let index = fs::read(layout.path().join("index.json")).unwrap();
    let parsed = cpu_time(|| {
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["manifests"].as_array().unwrap().len(), COUNT);
    });
    let refused = cpu_time(|| {
        let error = store.store.import("web", layout.path(), None).unwrap_err();
        assert!(matches!(error, ImageError::Several { names } if names.len() == COUNT));
    });
    assert!(refused < parsed * 10, "{refused:?} {parsed:?}");
}

#[test]
fn what_is_damaged_is_named() {
    let store = TestStore::new();
    let tar = Tar::default().file("x", &[7; 10_000]).finish();
    let layout = || {
        let mut layout = Layout::new();
        let image = layout.image(&[(GZIP, tar.clone())], json!({}));
        layout.index(slice::from_ref(&image));
        (layout, image)
    };
    let blobs = |layout: &Layout| {
        let paths = fs::read_dir(layout.path().join("blobs/sha256")).unwrap();
        let mut paths: Vec<_> = paths.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    };
    let (whole, _) = layout();
    for index in 0..blobs(&whole).len() {
        let (damaged, _) = layout();
        let path = &blobs(&damaged)[index];
        let bytes = fs::read(path).unwrap();
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(path, changed).unwrap();
            is(&store.refused(damaged.path()), |error| {
                matches!(error, ImageError::Digest { .. })
            });
        }
        for length in [0, bytes.len() / 2, bytes.len() - 1] {
            fs::write(path, &bytes[..length]).unwrap();
            is(&store.refused(damaged.path()), |error| {
                matches!(error, ImageError::Size { .. })
            });
        }
        fs::write(path, [&bytes[..], b"x"].concat()).unwrap();
        is(&store.refused(damaged.path()), |error| {
            matches!(error, ImageError::Size { .. })
        });
        fs::remove_file(path).unwrap();
        is(&store.refused(damaged.path()), |error| {
            matches!(error, ImageError::Missing(_))
        });
    }
    // A layer that is another than the configuration names.
    let mut other = Layout::new();
    let config = config_of([&b"another"[..]].into_iter(), &json!({}));
    let image = other.image_of(&[(GZIP, tar.clone())], &config);
    other.index(&[image]);
    is(&store.refused(other.path()), |error| {
        matches!(error, ImageError::Digest { .. })
    });
    // One that has the digest that it is named by, and is damaged.
    let mut broken = Layout::new();
    let config = config_of([&tar[..]].into_iter(), &json!({}));
    let image = broken.image_of(&[(PLAIN, b"\x1f\x8b\x08\x00damaged".to_vec())], &config);
    broken.index(&[image]);
    is(&store.refused(broken.path()), |error| {
        matches!(error, ImageError::Compression { .. })
    });
    for length in [512, 700, tar.len() - 1500] {
        let mut cut = Layout::new();
        let image = cut.image(&[(PLAIN, tar[..length].to_vec())], json!({}));
        cut.index(&[image]);
        is(&store.refused(cut.path()), |error| {
            matches!(
                error,
                ImageError::Layer {
                    source: LayerError::Tar(TarError::Truncated),
                    ..
                }
            )
        });
        // The same as a root file system.
        is(&store.refused(file_of(&tar[..length]).path()), |error| {
            matches!(
                error,
                ImageError::Tar(TarError::Truncated) | ImageError::NotAnImage { .. }
            )
        });
    }
}

#[test]
fn what_is_no_image_is_refused() {
    let store = TestStore::new();
    let folder = tempfile::tempdir().unwrap();
    is(&store.refused(folder.path()), |error| {
        matches!(error, ImageError::NotAnImage { .. })
    });
    for bytes in [&b""[..], b"text", &[0; 2048], &[7; 2048]] {
        is(&store.refused(file_of(bytes).path()), |error| {
            matches!(error, ImageError::NotAnImage { .. })
        });
    }
    is(&store.refused(std::path::Path::new("/dev/null")), |error| {
        matches!(error, ImageError::NotAnImage { .. })
    });
    is(&store.refused(std::path::Path::new("/nothing/here")), |error| {
        matches!(error, ImageError::Io { .. })
    });
    let bytes = support::compress(GZIP, b"text");
    is(&store.refused(file_of(&bytes).path()), |error| {
        matches!(error, ImageError::NotAnImage { .. })
    });
    is(&store.refused(file_of(b"BZh91AY&SY").path()), |error| {
        matches!(error, ImageError::Compression { .. })
    });
    let layout = Layout::new();
    for index in [
        "",
        "{",
        "[]",
        r#"{"schemaVersion":2}"#,
        r#"{"schemaVersion":2,"manifests":[{}]}"#,
    ] {
        fs::write(layout.path().join("index.json"), index).unwrap();
        is(&store.refused(layout.path()), |error| {
            matches!(error, ImageError::Document { .. })
        });
    }
    layout.index(&[]);
    is(&store.refused(layout.path()), |error| {
        matches!(error, ImageError::Missing(_))
    });
    fs::write(layout.path().join("index.json"), vec![b' '; 300 << 10]).unwrap();
    is(&store.refused(layout.path()), |error| {
        matches!(error, ImageError::Limit(Exceeded::Document(_)))
    });
}

#[test]
fn indexes_do_not_lead_in_circles() {
    let store = TestStore::new();
    let mut layout = Layout::new();
    // One that names itself would have to have its own digest in it.
    let digest = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
    let own = json!({"mediaType": INDEX, "digest": digest, "size": 200});
    let circle = json!({"schemaVersion": 2, "manifests": [own]}).to_string();
    fs::write(layout.blob_path(digest), format!("{circle:200}")).unwrap();
    layout.index(&[own]);
    is(&store.refused(layout.path()), |error| {
        matches!(error, ImageError::Digest { .. })
    });
    // One in another in another.
    let mut inner = layout.image(&[(PLAIN, Tar::default().file("x", b"").finish())], json!({}));
    for depth in 0..6 {
        layout.index(slice::from_ref(&inner));
        if depth <= 3 {
            store.store.import("test", layout.path(), None).unwrap();
            store.store.remove("test").unwrap();
        } else {
            is(&store.refused(layout.path()), |error| {
                matches!(error, ImageError::Nested(_))
            });
        }
        inner = layout.json(INDEX, &json!({"schemaVersion": 2, "manifests": [inner]}));
    }
}

#[test]
fn only_images_of_this_platform_and_of_known_kinds_are_taken() {
    let store = TestStore::new();
    let tar = Tar::default().file("x", b"").finish();
    let with = |change: fn(&mut Value)| {
        let mut layout = Layout::new();
        let mut config = config_of([&tar[..]].into_iter(), &json!({}));
        change(&mut config);
        let image = layout.image_of(&[(PLAIN, tar.clone())], &config);
        layout.index(&[image]);
        store.refused(layout.path())
    };
    is(
        &with(|config| config["architecture"] = "arm64".into()),
        |error| matches!(error, ImageError::Platform { found } if *found == ["linux/arm64"]),
    );
    is(&with(|config| config["os"] = "windows".into()), |error| {
        matches!(error, ImageError::Platform { .. })
    });
    is(&with(|config| config["rootfs"]["diff_ids"] = json!([])), |error| {
        matches!(error, ImageError::LayerCount { layers: 1, diff_ids: 0 })
    });
    is(
        &with(|config| config["rootfs"]["diff_ids"] = json!(["sha512:00"])),
        |error| matches!(error, ImageError::DigestName(_)),
    );
    is(&with(|config| config["config"]["User"] = "nobody".into()), |error| {
        matches!(error, ImageError::Config(ConfigError::User(_)))
    });

    let mut layout = Layout::new();
    let mut image = layout.image(&[(PLAIN, tar.clone())], json!({}));
    image["platform"] = json!({"os": "linux", "architecture": "arm64"});
    layout.index(slice::from_ref(&image));
    is(&store.refused(layout.path()), |error| {
        matches!(error, ImageError::Platform { .. })
    });
    image["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let known = image.clone();
    for media_type in ["application/vnd.docker.distribution.manifest.v1+json", "text/plain", ""] {
        image["mediaType"] = media_type.into();
        layout.index(slice::from_ref(&image));
        is(&store.refused(layout.path()), |error| {
            matches!(error, ImageError::MediaType { .. })
        });
    }
    // Beside an image they are somebody else's.
    layout.index(&[image, known]);
    store.store.import("test", layout.path(), None).unwrap();
    store.store.remove("test").unwrap();
    for layer in [
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
    ] {
        let image = layout.image(&[(layer, tar.clone())], json!({}));
        layout.index(&[image]);
        is(&store.refused(layout.path()), |error| {
            matches!(error, ImageError::MediaType { .. })
        });
    }
    let config = layout.json("application/vnd.cncf.helm.config.v1+json", &json!({}));
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []});
    let image = layout.json(MANIFEST, &manifest);
    layout.index(&[image]);
    is(&store.refused(layout.path()), |error| {
        matches!(error, ImageError::MediaType { .. })
    });
}

#[test]
fn an_archive_is_refused_like_a_folder() {
    let store = TestStore::new();
    let layer = Tar::default().file("x", b"").finish();
    let config = config_of([&layer[..]].into_iter(), &json!({})).to_string();
    let archive = |manifest: Value| {
        let tar = Tar::default()
            .file("config.json", config.as_bytes())
            .file("a/layer.tar", &layer)
            .link("b/layer.tar", "../a/layer.tar")
            .link("out", "../../../../etc/passwd")
            .link("circle", "circle")
            .file("manifest.json", manifest.to_string().as_bytes());
        store.refused(file_of(&tar.finish()).path())
    };
    for layer in ["nothing", "out", "circle", "../a/../../x", "/etc/passwd"] {
        is(
            &archive(json!([{"Config": "config.json", "Layers": [layer]}])),
            |error| matches!(error, ImageError::Missing(_)),
        );
    }
    is(&archive(json!([])), |error| matches!(error, ImageError::Missing(_)));
    is(&archive(json!({})), |error| {
        matches!(error, ImageError::Document { .. })
    });
    let one = json!({"Config": "config.json", "Layers": ["b/layer.tar"], "RepoTags": ["a:1"]});
    is(
        &archive(json!([one, one])),
        |error| matches!(error, ImageError::Several { names } if names.len() == 2),
    );
    is(
        &archive(json!([{"Config": "config.json", "Layers": ["config.json"]}])),
        |error| matches!(error, ImageError::Digest { .. }),
    );
    let tar = |config_name: &str| {
        let manifest = json!([{"Config": config_name, "Layers": ["b/layer.tar"], "RepoTags": null}]).to_string();
        let tar = Tar::default()
            .file(config_name, config.as_bytes())
            .file("a/layer.tar", &layer)
            .link("b/layer.tar", "../a/layer.tar")
            .file("manifest.json", manifest.as_bytes());
        file_of(&tar.finish())
    };
    let wrong = format!("{}.json", "0".repeat(64));
    is(&store.refused(tar(&wrong).path()), |error| {
        matches!(error, ImageError::Digest { .. })
    });
    store.store.import("good", tar("config.json").path(), None).unwrap();
}
