//! The files in `/etc` that say who and where a container is. They go into the overlay's upper layer, where the container
//! can't change them, and cover the image's.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use anyhow::Context as _;

use super::launcher::directory;

/// The name of the user and the group that functions run as, on Lambda.
const USER: &str = "sbx_user1051";

/// Writes them for a container of this host name, user and group.
pub(super) fn write(image: &Path, upper: &Path, hostname: &str, uid: u32) -> anyhow::Result<()> {
    let etc = upper.join("etc");
    directory(&etc, 0o755)?;
    let of_image = |name: &str| {
        let path = image.join("etc").join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    files(
        &etc,
        &[
            // The second line is how extensions are to be reached that subscribe to telemetry.
            ("hosts", hosts(hostname) + "127.0.0.1 sandbox.localdomain sandbox\n"),
            ("passwd", of_image("passwd")? + &user(uid)),
            ("group", of_image("group")? + &group(uid)),
        ],
    )
}

/// Writes those that say where an image runs, which may change them: as in Docker, they are no part of it. `image` is not followed
/// anywhere: where its `/etc` is no folder, nothing is written.
pub(super) fn write_for_image(image: &Path, upper: &Path, hostname: &str) -> anyhow::Result<()> {
    let etc = upper.join("etc");
    let (mode, owner) = match image.join("etc").symlink_metadata() {
        Ok(found) if found.is_dir() => (found.mode() & 0o7777, (found.uid(), found.gid())),
        Ok(_) => return Ok(()),
        Err(_) => (0o755, (0, 0)),
    };
    directory(&etc, mode)?;
    chown(&etc, Some(owner.0), Some(owner.1)).context("cannot give /etc its owner")?;
    files(
        &etc,
        &[
            ("hosts", hosts(hostname)),
            ("hostname", format!("{hostname}\n")),
            ("resolv.conf", "# This machine has no network.\n".to_owned()),
        ],
    )
}

fn files(etc: &Path, files: &[(&str, String)]) -> anyhow::Result<()> {
    for (name, content) in files {
        let path = etc.join(name);
        std::fs::write(&path, content)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// hosts(5), without IPv6, which not every kernel of a guest has.
fn hosts(hostname: &str) -> String {
    format!("127.0.0.1 localhost {hostname}\n")
}

/// passwd(5)
fn user(uid: u32) -> String {
    format!("{USER}:x:{uid}:{uid}::/home/{USER}:/usr/sbin/nologin\n")
}

/// group(5)
fn group(gid: u32) -> String {
    format!("{USER}:x:{gid}:\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_have_a_name_and_a_user() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        std::fs::create_dir_all(at("image/etc")).unwrap();
        std::fs::create_dir(at("upper")).unwrap();
        std::fs::write(at("image/etc/passwd"), "root:*:0:0:root:/root:/bin/bash\n").unwrap();
        std::fs::write(at("image/etc/group"), "root:*:0:\n").unwrap();
        write(&at("image"), &at("upper"), "01J", 100_007).unwrap();
        for (name, content) in [
            (
                "hosts",
                "127.0.0.1 localhost 01J\n127.0.0.1 sandbox.localdomain sandbox\n",
            ),
            (
                "passwd",
                "root:*:0:0:root:/root:/bin/bash\n\
                 sbx_user1051:x:100007:100007::/home/sbx_user1051:/usr/sbin/nologin\n",
            ),
            ("group", "root:*:0:\nsbx_user1051:x:100007:\n"),
        ] {
            let path = at("upper/etc").join(name);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o644);
        }
    }

    #[test]
    fn an_image_is_told_where_it_runs_and_keeps_its_users() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for upper in ["upper", "other", "third"] {
            std::fs::create_dir(at(upper)).unwrap();
        }
        std::fs::create_dir_all(at("image/etc")).unwrap();
        std::fs::set_permissions(at("image/etc"), std::fs::Permissions::from_mode(0o750)).unwrap();
        chown(at("image/etc"), Some(7), Some(8)).unwrap();
        write_for_image(&at("image"), &at("upper"), "web-1").unwrap();
        let etc = at("upper/etc").metadata().unwrap();
        assert_eq!((etc.mode() & 0o7777, etc.uid(), etc.gid()), (0o750, 7, 8));
        let read = |name: &str| std::fs::read_to_string(at("upper/etc").join(name)).unwrap();
        assert_eq!(read("hosts"), "127.0.0.1 localhost web-1\n");
        assert_eq!(read("hostname"), "web-1\n");
        assert!(!at("upper/etc/passwd").exists());
        // Without such a folder one is made; a link that leads out is left alone.
        write_for_image(&at("nowhere"), &at("other"), "web-1").unwrap();
        assert!(at("other/etc/hosts").exists());
        std::fs::create_dir_all(at("links")).unwrap();
        std::os::unix::fs::symlink("/etc", at("links/etc")).unwrap();
        write_for_image(&at("links"), &at("third"), "web-1").unwrap();
        assert!(!at("third/etc").exists());
    }
}
