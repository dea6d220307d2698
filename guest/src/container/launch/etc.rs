//! The files in `/etc` that say who and where a container is. They go into the overlay's upper layer, where the container
//! can't change them, and cover the image's.

use std::os::unix::fs::PermissionsExt as _;
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
    for (name, content) in [
        // Without IPv6, which not every kernel of a guest has.
        (
            "hosts",
            // The second line is how extensions are to be reached that subscribe to telemetry.
            format!("127.0.0.1 localhost {hostname}\n127.0.0.1 sandbox.localdomain sandbox\n"),
        ),
        ("passwd", of_image("passwd")? + &user(uid)),
        ("group", of_image("group")? + &group(uid)),
    ] {
        let path = etc.join(name);
        std::fs::write(&path, content)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
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
}
