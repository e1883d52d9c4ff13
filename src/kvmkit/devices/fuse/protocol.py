"""FUSE's messages (``include/uapi/linux/fuse.h``, protocol 7.38) as `struct` formats, named as there.

A request is a header, a fixed part by opcode, then names or data; an answer is a header and a fixed part or data.
"""

import os
from struct import Struct

VERSION = 7
MINOR = 38
MINOR_MIN = 31
"""The oldest we speak: Linux 5.4's, the first with virtio-fs."""

ROOT_ID = 1

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = range(8, 19)
FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = range(20, 30)
FSYNCDIR, GETLK, SETLK, SETLKW, ACCESS, CREATE, INTERRUPT, BMAP, DESTROY, IOCTL, POLL = range(30, 41)
NOTIFY_REPLY, BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE = range(41, 48)
SETUPMAPPING, REMOVEMAPPING, SYNCFS, TMPFILE = range(48, 52)

ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
BIG_WRITES = 1 << 5
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
HANDLE_KILLPRIV_V2 = 1 << 28

FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME, FATTR_FH = (1 << i for i in range(7))
FATTR_ATIME_NOW, FATTR_MTIME_NOW = 1 << 7, 1 << 8
FATTR_KILL_SUIDGID = 1 << 11

GETATTR_FH = 1 << 0
FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR, FOPEN_NOFLUSH = 1 << 1, 1 << 3, 1 << 5
OPEN_KILL_SUIDGID = 1 << 0
WRITE_CACHE, WRITE_KILL_SUIDGID = 1 << 0, 1 << 2
FSYNC_FDATASYNC = 1 << 0

in_header = Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding"""
out_header = Struct("<IiQ")
"""len, error (a negative errno or 0), unique"""

init_in = Struct("<IIII")
"""major, minor, max_readahead, flags; flags2 follows"""
init_out = Struct("<IIIIHHIIHHI28x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2"""

attr = Struct("<QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime, their nsec, mode, nlink, uid, gid, rdev, blksize, flags"""
attr_out = Struct("<QI4x" + attr.format[1:])
"""attr_valid, attr_valid_nsec, attr"""
entry_out = Struct("<QQQQII" + attr.format[1:])
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, attr"""
dirent = Struct("<QQII")
"""ino, off, namelen, type; the name follows, padded to 8 bytes"""

forget_in = Struct("<Q")
"""nlookup"""
batch_forget_in = Struct("<I4x")
"""count"""
forget_one = Struct("<QQ")
"""nodeid, nlookup"""
getattr_in = Struct("<I4xQ")
"""getattr_flags, fh"""
setattr_in = Struct("<I4xQQ8xqqqIIIIIII4x")
"""valid, fh, size, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, unused4, uid, gid"""
mknod_in = Struct("<IIII")
"""mode, rdev, umask, padding"""
mkdir_in = Struct("<II")
"""mode, umask"""
rename_in = Struct("<Q")
"""newdir"""
rename2_in = Struct("<QI4x")
"""newdir, flags"""
link_in = Struct("<Q")
"""oldnodeid"""
open_in = Struct("<II")
"""flags, open_flags"""
create_in = Struct("<IIII")
"""flags, mode, umask, open_flags"""
open_out = Struct("<QI4x")
"""fh, open_flags"""
release_in = Struct("<QIIQ")
"""fh, flags, release_flags, lock_owner"""
flush_in = Struct("<QIIQ")
"""fh, unused, padding, lock_owner"""
read_in = Struct("<QQIIQII")
"""fh, offset, size, read_flags, lock_owner, flags, padding"""
write_in = Struct("<QQIIQII")
"""fh, offset, size, write_flags, lock_owner, flags, padding"""
write_out = Struct("<I4x")
"""size"""
statfs_out = Struct("<QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding"""
fsync_in = Struct("<QI4x")
"""fh, fsync_flags"""
setxattr_in = Struct("<II")
"""size, flags"""
getxattr_in = Struct("<I4x")
"""size"""
getxattr_out = Struct("<I4x")
"""size"""
access_in = Struct("<I4x")
"""mask"""
fallocate_in = Struct("<QQQI4x")
"""fh, offset, length, mode"""
lseek_in = Struct("<QQI4x")
"""fh, offset, whence"""
lseek_out = Struct("<Q")
"""offset"""
copy_file_range_in = Struct("<QQQQQQQ")
"""fh_in, off_in, nodeid_out, fh_out, off_out, len, flags"""


def attributes(st: os.stat_result, ino: int, uid: int, gid: int) -> tuple[int, ...]:
    """The values of a ``fuse_attr``: what stat(2) says, with the inode number and the owners that the guest shall see."""
    device = st.st_rdev
    if device:  # as new_encode_dev() of the kernel does
        major, minor = os.major(device), os.minor(device)
        device = minor & 0xFF | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12
    atime_s, atime_ns = divmod(st.st_atime_ns, 1_000_000_000)
    mtime_s, mtime_ns = divmod(st.st_mtime_ns, 1_000_000_000)
    ctime_s, ctime_ns = divmod(st.st_ctime_ns, 1_000_000_000)
    return (
        ino,
        st.st_size,
        st.st_blocks,
        atime_s & 0xFFFFFFFFFFFFFFFF,  # times before 1970
        mtime_s & 0xFFFFFFFFFFFFFFFF,
        ctime_s & 0xFFFFFFFFFFFFFFFF,
        atime_ns,
        mtime_ns,
        ctime_ns,
        st.st_mode,
        st.st_nlink & 0xFFFFFFFF,
        uid,
        gid,
        device,
        st.st_blksize & 0xFFFFFFFF,
        0,
    )
