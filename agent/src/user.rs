//! Users by the guest's own /etc/passwd and /etc/group (passwd(5), group(5)); no NSS, which a static program hasn't.

use crate::frame::Failure;
use nix::unistd::{Gid, Uid};
use std::path::Path;

/// Who a command is to be.
#[derive(Debug, PartialEq)]
pub struct User {
    pub uid: Uid,
    pub gid: Gid,
    /// Supplementary groups.
    pub groups: Vec<Gid>,
    /// Name, home directory and shell, where /etc/passwd has the user.
    pub entry: Option<Entry>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub name: String,
    pub home: String,
    pub shell: String,
}

/// Look up `user`, `uid`, `user:group` or `uid:gid`, as container images spell it.
pub fn look_up(spec: &str) -> Result<User, Failure> {
    parse(spec, &read("/etc/passwd"), &read("/etc/group"))
}

fn read(path: &str) -> String {
    // An image without the files has its numbers all the same; names that are no UTF-8 can't be asked for.
    std::fs::read(Path::new(path)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

fn parse(spec: &str, passwd: &str, group: &str) -> Result<User, Failure> {
    let (name, group_name) = match spec.split_once(':') {
        Some((name, group_name)) => (name, Some(group_name)),
        None => (spec, None),
    };
    let entries = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let (uid, gid) = (fields.nth(1)?.parse::<u32>().ok()?, fields.next()?.parse::<u32>().ok()?);
        let home = fields.nth(1)?;
        let shell = fields.next().unwrap_or_default();
        Some((uid, gid, Entry { name: name.into(), home: home.into(), shell: shell.into() }))
    });
    let number = number(name);
    let found = { entries }.find(|(uid, _, entry)| entry.name == name || Some(*uid) == number);
    let (uid, gid, entry) = match (found, number) {
        (Some((uid, gid, entry)), _) => (uid, gid, Some(entry)),
        (None, Some(uid)) => (uid, 0, None),
        (None, None) => {
            return Err(Failure::new(libc::EINVAL, format!("user {name:?}: not in the guest's /etc/passwd")));
        }
    };
    let (gid, groups) = match group_name {
        Some(wanted) => (group_id(wanted, group)?, vec![]),
        None => (Gid::from_raw(gid), entry.as_ref().map_or(vec![], |entry| memberships(&entry.name, group))),
    };
    Ok(User { uid: Uid::from_raw(uid), gid, groups, entry })
}

/// A number as a user or group; u32::MAX means "unchanged" to the kernel and is none.
fn number(text: &str) -> Option<u32> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok().filter(|id| *id != u32::MAX) } else { None }
}

/// Name, id and members of each line of /etc/group.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        Some((fields.next()?, fields.nth(1)?.parse().ok()?, fields.next().unwrap_or_default()))
    })
}

fn group_id(wanted: &str, group: &str) -> Result<Gid, Failure> {
    groups(group)
        .find_map(|(name, gid, _)| (name == wanted).then_some(gid))
        .or_else(|| number(wanted))
        .map(Gid::from_raw)
        .ok_or_else(|| Failure::new(libc::EINVAL, format!("group {wanted:?}: not in the guest's /etc/group")))
}

fn memberships(user: &str, group: &str) -> Vec<Gid> {
    groups(group)
        .filter(|(_, _, members)| members.split(',').any(|member| member == user))
        .map(|(_, gid, _)| Gid::from_raw(gid))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nann:x:1000:100:Ann,,:/home/ann:/bin/zsh\n7up:x:8:8::/:\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\ndisk:x:6:bob,ann\n+\naudio:x:29:annie\n";

    fn ids(spec: &str) -> Option<(u32, u32, Vec<u32>)> {
        let user = parse(spec, PASSWD, GROUP).ok()?;
        Some((user.uid.as_raw(), user.gid.as_raw(), user.groups.iter().map(|gid| gid.as_raw()).collect()))
    }

    #[test]
    fn users_by_name_and_number() {
        assert_eq!(ids("ann"), Some((1000, 100, vec![6])));
        assert_eq!(ids("1000"), ids("ann"));
        assert_eq!(ids("7up"), Some((8, 8, vec![])));
        assert_eq!(ids("77"), Some((77, 0, vec![])));
        assert_eq!(ids("ann:disk"), Some((1000, 6, vec![])));
        assert_eq!(ids("5:60"), Some((5, 60, vec![])));
        assert_eq!(parse("1000", PASSWD, GROUP).unwrap().entry.unwrap().home, "/home/ann");
    }

    #[test]
    fn what_is_no_user() {
        for spec in ["", "bob", "-1", "4294967295", "4294967296", "ann:", "ann:nobody", "ann:100:5", "broken"] {
            assert_eq!(ids(spec), None, "{spec}");
        }
    }

    #[test]
    fn without_files_there_are_numbers() {
        assert_eq!(parse("0", "", "").unwrap().entry, None);
    }
}
