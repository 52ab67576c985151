//! Owner, permissions, access lists and attributes of a file, which a replacement keeps of what it replaces.

#[cfg(unix)]
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

/// Gives a file the owner, group, permissions, access control list and extended attributes of one that exists. Returns
/// what could not be kept.
#[cfg(unix)]
pub fn keep(file: &File, existing: &Metadata, path: &Path) -> io::Result<Vec<String>> {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    let lost_owner = keep_owner(file, existing)?;
    let (lost_attributes, lost_acl) = keep_attributes(file, path);
    // What the file may do as its owner it must not do as another.
    let mut mode = existing.permissions().mode() & 0o7777;
    if lost_owner.is_some() {
        mode &= 0o777;
    }
    // Beside a list the group's bits are the most that anybody in it may do, and not what the group may.
    if lost_acl {
        mode &= !0o070;
    }
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(lost_owner.into_iter().chain(lost_attributes).collect())
}

#[cfg(not(unix))]
pub fn keep(file: &File, existing: &Metadata, _: &Path) -> io::Result<Vec<String>> {
    file.set_permissions(existing.permissions())?;
    Ok(Vec::new())
}

#[cfg(unix)]
fn keep_owner(file: &File, existing: &Metadata) -> io::Result<Option<String>> {
    use std::os::unix::fs::{MetadataExt as _, fchown};

    let new = file.metadata()?;
    let (owner, group) = (existing.uid(), existing.gid());
    if (new.uid(), new.gid()) == (owner, group) || fchown(file, Some(owner), Some(group)).is_ok() {
        return Ok(None);
    }
    let lost_group = new.gid() != group && fchown(file, None, Some(group)).is_err();
    let lost = match (new.uid() != owner, lost_group) {
        (true, true) => format!("its owner {owner} and group {group} could not be kept"),
        (true, false) => format!("its owner {owner} could not be kept"),
        (false, true) => format!("its group {group} could not be kept"),
        (false, false) => return Ok(None),
    };
    Ok(Some(lost))
}

/// An access control list as Linux keeps it.
#[cfg(unix)]
const ACL: &str = "system.posix_acl_access";

/// Gives a file the attributes of the one at `path`. Returns which could not be kept, and whether its access control list
/// is among them. A file system without attributes has none to lose.
#[cfg(unix)]
fn keep_attributes(file: &File, path: &Path) -> (Option<String>, bool) {
    use xattr::FileExt as _;

    // What security modules and file systems keep for themselves holds for that one file.
    let is_kept = |name: &OsString| {
        let name = name.to_string_lossy();
        !["security.", "trusted."]
            .iter()
            .any(|of| name.starts_with(of))
    };
    let names: Vec<_> = xattr::list(path)
        .into_iter()
        .flatten()
        .filter(is_kept)
        .collect();
    // A folder may give every new file a list.
    if !names.iter().any(|name| name == ACL) {
        let _ = file.remove_xattr(ACL);
    }
    let is_lost = |name: &&OsString| match xattr::get(path, name) {
        Ok(Some(value)) => {
            let has_it = matches!(file.get_xattr(name), Ok(Some(own)) if own == value);
            !has_it && file.set_xattr(name, &value).is_err()
        }
        Ok(None) => false,
        Err(_) => true,
    };
    let lost: Vec<_> = names.iter().filter(is_lost).collect();
    let lost_acl = lost.iter().any(|name| *name == ACL);
    let words = lost.iter().map(|name| name.to_string_lossy());
    let words = words.collect::<Vec<_>>().join(", ");
    let lost = (!lost.is_empty()).then(|| format!("its attributes {words} could not be kept"));
    (lost, lost_acl)
}
