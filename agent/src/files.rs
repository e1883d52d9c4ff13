//! The guest's files for the host: one at a time, or a tree as a tar stream.

use crate::frame::*;
use crate::text::Text;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

fn failure(path: &Path) -> impl Fn(io::Error) -> Failure + '_ {
    move |error| Failure::of(path.display(), error)
}

/// DATA frames of the file's bytes, then END.
pub fn read(connection: &mut Connection, path: &Path) -> Result<(), Failure> {
    let mut file = File::open(path).map_err(failure(path))?;
    let mut frame = vec![0; HEADER_BYTES + MAX_PAYLOAD_BYTES];
    loop {
        let count = match file.read(&mut frame[HEADER_BYTES..]) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failure(path)(error)),
        };
        frame[0] = DATA;
        frame[1..HEADER_BYTES].copy_from_slice(&(count as u32).to_le_bytes());
        connection.stream.write_all(&frame[..HEADER_BYTES + count]).map_err(|error| Failure::of("send", error))?;
    }
    connection.send(END, b"").map_err(|error| Failure::of("send", error))
}

/// Tell the host to go on, and give the stream that it sends to `take`; what that leaves of it is read all the same.
fn receive(
    connection: &mut Connection,
    take: impl FnOnce(&mut DataReader) -> Result<(), Failure>,
) -> Result<Value, Failure> {
    connection.reply(&json!({})).map_err(|error| Failure::of("send", error))?;
    let mut reader = DataReader::new(connection);
    let result = take(&mut reader);
    io::copy(&mut reader, &mut io::sink()).map_err(|error| Failure::of("receive", error))?;
    result.map(|()| json!({}))
}

/// Write what the host sends into a file, made or emptied first.
pub fn write(
    connection: &mut Connection,
    path: &Path,
    mode: Option<u32>,
    mtime_ns: Option<u64>,
) -> Result<Value, Failure> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode.unwrap_or(0o644))
        .open(path)
        .map_err(failure(path))?;
    receive(connection, |reader| {
        io::copy(reader, &mut file).map_err(failure(path))?;
        if let Some(mode) = mode {
            file.set_permissions(fs::Permissions::from_mode(mode & 0o7777)).map_err(failure(path))?;
        }
        if let Some(ns) = mtime_ns {
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_nanos(ns)).map_err(failure(path))?;
        }
        Ok(())
    })
}

pub fn stat(path: &Path, follow: bool) -> Result<Value, Failure> {
    let meta = if follow { fs::metadata(path) } else { fs::symlink_metadata(path) }.map_err(failure(path))?;
    let kind = match meta.file_type() {
        kind if kind.is_file() => "file",
        kind if kind.is_dir() => "directory",
        kind if kind.is_symlink() => "symlink",
        kind if kind.is_fifo() => "fifo",
        kind if kind.is_socket() => "socket",
        kind if kind.is_block_device() => "block",
        _ => "character",
    };
    let target =
        if kind == "symlink" { Some(Text::of(fs::read_link(path).map_err(failure(path))?.as_os_str())) } else { None };
    Ok(json!({
        "kind": kind,
        "mode": meta.mode() & 0o7777,
        "size_bytes": meta.size(),
        "mtime_ns": meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
        "uid": meta.uid(),
        "gid": meta.gid(),
        "target": target,
    }))
}

/// DATA frames of names, each a line of JSON, then END.
pub fn list(connection: &mut Connection, path: &Path) -> Result<(), Failure> {
    let mut lines = Vec::new();
    let mut output = io::BufWriter::with_capacity(MAX_PAYLOAD_BYTES, DataWriter(connection));
    for entry in fs::read_dir(path).map_err(failure(path))? {
        lines.clear();
        let name = Text::of(&entry.map_err(failure(path))?.file_name());
        serde_json::to_writer(&mut lines, &name).map_err(|error| Failure::new(libc::EIO, error.to_string()))?;
        lines.push(b'\n');
        output.write_all(&lines).map_err(|error| Failure::of("send", error))?;
    }
    output.flush().map_err(|error| Failure::of("send", error))?;
    drop(output);
    connection.send(END, b"").map_err(|error| Failure::of("send", error))
}

/// Remove a file or an empty directory; with `recursive` a directory with all that is in it.
pub fn remove(path: &Path, recursive: bool) -> Result<Value, Failure> {
    let meta = fs::symlink_metadata(path).map_err(failure(path))?;
    if !meta.is_dir() {
        fs::remove_file(path)
    } else if recursive {
        fs::remove_dir_all(path)
    } else {
        fs::remove_dir(path)
    }
    .map(|()| json!({}))
    .map_err(failure(path))
}

pub fn mkdir(path: &Path, parents: bool) -> Result<Value, Failure> {
    if parents { fs::create_dir_all(path) } else { fs::create_dir(path) }.map(|()| json!({})).map_err(failure(path))
}

pub fn rename(from: &Path, to: &Path) -> Result<Value, Failure> {
    fs::rename(from, to).map(|()| json!({})).map_err(failure(from))
}

/// DATA frames of a tar archive of what is at `path`, then END. Members are named relative to it, the directory itself ".".
/// Files, directories and symbolic links alone: a socket or device means nothing elsewhere.
pub fn pack(connection: &mut Connection, path: &Path) -> Result<(), Failure> {
    fs::symlink_metadata(path).map_err(failure(path))?;
    let output = io::BufWriter::with_capacity(MAX_PAYLOAD_BYTES, DataWriter(connection));
    let mut archive = tar::Builder::new(output);
    let mut pending = vec![PathBuf::from(".")];
    while let Some(name) = pending.pop() {
        let full = if name == Path::new(".") { path.to_path_buf() } else { path.join(&name) };
        match pack_one(&mut archive, &full, &name, &mut pending) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && name != Path::new(".") => {} // it went meanwhile
            result => result.map_err(failure(&full))?,
        }
    }
    let output = archive.into_inner().map_err(|error| Failure::of("send", error))?;
    output.into_inner().map_err(|error| Failure::of("send", error.into_error()))?;
    connection.send(END, b"").map_err(|error| Failure::of("send", error))
}

fn pack_one(
    archive: &mut tar::Builder<impl Write>,
    full: &Path,
    name: &Path,
    pending: &mut Vec<PathBuf>,
) -> io::Result<()> {
    let meta = fs::symlink_metadata(full)?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&meta);
    if meta.is_dir() {
        archive.append_data(&mut header, name, io::empty())?;
        for entry in fs::read_dir(full)? {
            let child = entry?.file_name();
            pending.push(if name == Path::new(".") { PathBuf::from(child) } else { name.join(child) });
        }
    } else if meta.is_symlink() {
        let target = fs::read_link(full)?;
        header.set_size(0);
        archive.append_link(&mut header, name, target)?;
    } else if meta.is_file() {
        let file = File::open(full)?;
        let size = meta.len();
        // As long as the header says, whatever is done to the file meanwhile.
        archive.append_data(&mut header, name, file.chain(io::repeat(0)).take(size))?;
    }
    Ok(())
}

/// Unpack the tar archive that the host sends into the directory `path`, which is made if need be. Modes and times are kept;
/// owner is whoever the agent is. Nothing is written outside of `path`.
pub fn unpack(connection: &mut Connection, path: &Path) -> Result<Value, Failure> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        result => result.map_err(failure(path))?,
    }
    let path = &path.canonicalize().map_err(failure(path))?;
    receive(connection, |reader| unpack_all(reader, path))
}

fn unpack_all(reader: &mut impl Read, path: &Path) -> Result<(), Failure> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    let mut directories = Vec::new();
    for entry in archive.entries().map_err(failure(path))? {
        let mut entry = entry.map_err(failure(path))?;
        let name = entry.path().map_err(failure(path))?.into_owned();
        if entry.header().entry_type().is_dir() {
            let (mode, mtime) = (entry.header().mode(), entry.header().mtime());
            // Made now for what it holds, which its mode and time would not outlive.
            if name.file_name() != Some(OsStr::new(".")) && name.components().next().is_some() {
                put(&mut entry, path, &name)?;
                let made = path.join(&name);
                if fs::symlink_metadata(&made).is_ok_and(|meta| meta.is_dir()) {
                    fs::set_permissions(&made, fs::Permissions::from_mode(0o700)).map_err(failure(&made))?;
                }
            }
            directories.push((path.join(&name), mode.map_err(failure(path))?, mtime.map_err(failure(path))?));
        } else {
            put(&mut entry, path, &name)?;
        }
    }
    for (directory, mode, mtime) in directories.iter().rev() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs((*mtime).min(1 << 40)); // more would be beyond any clock
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(directory);
        let opened = opened.map_err(failure(directory))?;
        opened.set_permissions(fs::Permissions::from_mode(mode & 0o7777)).map_err(failure(directory))?;
        opened.set_modified(time).map_err(failure(directory))?;
    }
    Ok(())
}

fn put(entry: &mut tar::Entry<impl Read>, path: &Path, name: &Path) -> Result<(), Failure> {
    if entry.unpack_in(path).map_err(failure(&path.join(name)))? {
        return Ok(());
    }
    Err(Failure::new(libc::EINVAL, format!("archive member {name:?}: it leaves the directory it is unpacked into")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn archive(members: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, kind, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o640);
            header.set_mtime(1_000_000);
            let gnu = header.as_gnu_mut().unwrap();
            gnu.name[..name.len()].copy_from_slice(name.as_bytes()); // as it is: set_path would refuse ".."
            let data = if kind.is_file() {
                content.as_bytes()
            } else {
                gnu.linkname[..content.len()].copy_from_slice(content.as_bytes());
                b""
            };
            header.set_size(data.len() as u64);
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("kvmkit-agent-{}-{name}", std::process::id()));
            fs::create_dir_all(path.join("in")).unwrap();
            Directory(path.canonicalize().unwrap())
        }

        fn unpack(&self, members: &[(&str, tar::EntryType, &str)]) -> Result<(), Failure> {
            unpack_all(&mut &archive(members)[..], &self.0.join("in"))
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;
    const DIRECTORY: tar::EntryType = tar::EntryType::Directory;
    const LINK: tar::EntryType = tar::EntryType::Symlink;

    #[test]
    fn modes_times_and_links() {
        let directory = Directory::new("plain");
        directory
            .unpack(&[("a", DIRECTORY, ""), ("a/f", FILE, "text"), ("a/l", LINK, "/absolute"), ("a/f", FILE, "again")])
            .unwrap();
        let meta = fs::metadata(directory.0.join("in/a/f")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime(), meta.len()), (0o640, 1_000_000, 5));
        assert_eq!(fs::metadata(directory.0.join("in/a")).unwrap().mtime(), 1_000_000);
        assert_eq!(fs::read_link(directory.0.join("in/a/l")).unwrap(), Path::new("/absolute"));
    }

    #[test]
    fn nothing_leaves_the_directory() {
        let directory = Directory::new("escape");
        symlink("..", directory.0.join("in/up")).unwrap();
        for members in [
            &[("../out", FILE, "x")][..],
            &[("a/../../out", FILE, "x")],
            &[("up/out", FILE, "x")],
            &[("l", LINK, ".."), ("l/out", FILE, "x")],
            &[("l2", LINK, "../out"), ("l2", DIRECTORY, "")],
        ] {
            assert!(directory.unpack(members).is_err(), "{members:?}");
            assert!(!directory.0.join("out").exists());
        }
        // A link that is replaced isn't followed.
        directory.unpack(&[("l3", LINK, "../out"), ("l3", FILE, "x")]).unwrap();
        assert!(!directory.0.join("out").exists());
        // An absolute name is taken below the directory, as tar does.
        directory.unpack(&[("/absolute", FILE, "x")]).unwrap();
        assert!(directory.0.join("in/absolute").exists());
    }
}
