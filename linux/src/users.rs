//! Users of a root file system, by the `/etc/passwd` and `/etc/group` in it (passwd(5), group(5)), which may be anybody's.

use serde::{Deserialize, Serialize};

/// What is to be read at most of each of the files, in bytes.
pub const FILE_BYTES: u64 = 1 << 20;

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The user.
    pub uid: u32,
    /// The user's own group, or the one that is named.
    pub gid: u32,
    /// Other groups that the user is in; none where a group is named.
    pub groups: Vec<u32>,
    /// Home folder, `/` where none is known.
    pub home: String,
}

/// Why there is no such user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// No user of that name.
    #[error("there is no user {0:?} in its /etc/passwd")]
    User(String),
    /// No group of that name.
    #[error("there is no group {0:?} in its /etc/group")]
    Group(String),
}

/// Finds `USER` or `USER:GROUP`, each a name or a number, by the content of the two files. Numbers need not be in them.
///
/// # Errors
/// Where a name is not in the files, or a number can't be one.
pub fn look_up(text: &str, passwd: &[u8], group: &[u8]) -> Result<User, UserError> {
    let [passwd, group] = [passwd, group].map(String::from_utf8_lossy);
    let (user, group_name) = text.split_once(':').unwrap_or((text, ""));
    let user = if user.is_empty() { "0" } else { user };
    let mut known = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid: u32 = fields.nth(1)?.parse().ok()?;
        let gid: u32 = fields.next()?.parse().ok()?;
        let home = fields.nth(1).filter(|home| home.starts_with('/')).unwrap_or("/");
        Some((name, uid, gid, home))
    });
    let known = known.find(|(name, uid, ..)| *name == user || user.parse() == Ok(*uid));
    let groups = group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid: u32 = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    });
    let (uid, gid, home) = match (known, user.parse()) {
        (Some((_, uid, gid, home)), _) => (uid, gid, home),
        (None, Ok(uid)) => (uid, 0, "/"),
        (None, Err(_)) => return Err(UserError::User(user.to_owned())),
    };
    let (gid, groups) = if group_name.is_empty() {
        let is_in = |members: &str| known.is_some_and(|(name, ..)| members.split(',').any(|member| member == name));
        let mut others: Vec<u32> = groups
            .filter(|(.., members)| is_in(members))
            .map(|(_, gid, _)| gid)
            .collect();
        others.sort_unstable();
        others.dedup();
        others.retain(|other| *other != gid);
        (gid, others)
    } else {
        let mut groups = groups;
        let known = groups.find(|(name, gid, _)| *name == group_name || group_name.parse() == Ok(*gid));
        match (known, group_name.parse()) {
            (Some((_, gid, _)), _) | (None, Ok(gid)) => (gid, Vec::new()),
            (None, Err(_)) => return Err(UserError::Group(group_name.to_owned())),
        }
    };
    // The kernel takes the highest number for "leave it as it is".
    if uid == u32::MAX {
        return Err(UserError::User(user.to_owned()));
    }
    if gid == u32::MAX {
        return Err(UserError::Group(text.to_owned()));
    }
    Ok(User {
        uid,
        gid,
        groups,
        home: home.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nbroken\n\xff:x:7:7::/bin\nweb:x:101:102::/srv:/bin/sh\n\
        bare:x:9:9\nrel:x:10:10::home:\n";
    const GROUP: &[u8] = b"root:x:0:\nweb:x:102:web\nlog:x:4:web,other\nssl:x:5:other,web\nbroken:x\n";

    fn user(text: &str) -> (u32, u32, Vec<u32>, String) {
        let user = look_up(text, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.groups, user.home)
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        for text in ["", "root", "0", "0:0", "root:root"] {
            assert_eq!(user(text), (0, 0, vec![], "/root".to_owned()), "{text}");
        }
        for text in ["web", "101"] {
            assert_eq!(user(text), (101, 102, vec![4, 5], "/srv".to_owned()), "{text}");
        }
        for text in ["web:log", "web:4", "101:log"] {
            assert_eq!(user(text), (101, 4, vec![], "/srv".to_owned()), "{text}");
        }
        assert_eq!(user("1234"), (1234, 0, vec![], "/".to_owned()));
        assert_eq!(user("1234:999"), (1234, 999, vec![], "/".to_owned()));
        assert_eq!(user("bare"), (9, 9, vec![], "/".to_owned()));
        assert_eq!(user("rel").3, "/");
    }

    #[test]
    fn who_is_not_there_is_refused() {
        assert_eq!(
            look_up("0:4294967295", PASSWD, GROUP),
            Err(UserError::Group("0:4294967295".to_owned()))
        );
        for text in ["nobody", "-1", "4294967295", "4294967296", "web2", "broken"] {
            assert_eq!(
                look_up(text, PASSWD, GROUP),
                Err(UserError::User(text.to_owned())),
                "{text}"
            );
        }
        for text in ["nogroup", "broken", "-1"] {
            let error = look_up(&format!("web:{text}"), PASSWD, GROUP);
            assert_eq!(error, Err(UserError::Group(text.to_owned())), "{text}");
        }
    }
}
