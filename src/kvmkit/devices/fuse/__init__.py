"""A FUSE server of our own, for virtio-fs: `protocol` is the wire, `inodes` who is who, `passthrough` a directory of the host.

Why not Debian's virtiofsd behind vhost-user: it wants root or a user namespace with subordinate ids, which the users of a library
often don't have, and it writes guest memory behind the back of a software engine, which must hear of such writes. The cost is
tens of microseconds per request in Python where virtiofsd takes a few; file data passes between file and guest memory by the
host's kernel in both.

**What the guest can't do.** It names inodes by number and names by single components. A number is looked up in a table
(`inodes`), a component is checked to be one and is resolved by the host's kernel with O_NOFOLLOW below a directory's descriptor;
nothing the guest sends is ever walked as a path. So symbolic links are text for the guest to resolve, and neither they nor ``..``
lead out of the shared directory, however the tree changes meanwhile. Files are opened in two steps: O_PATH, which has no effect on
anything, then, once it is known to be a regular file or a directory and the one that the guest meant, for real. Devices, fifos and
sockets show up but are never opened here; in the guest they are the guest's own. File systems that are an interface to the host's
kernel (/proc, where /proc/PID/mem would be a way out, /sys, …) appear as empty directories.

**What remains.** A guest that may write to a directory may fill its disk. What is moved out of the directory while the guest
has it open stays open, as for any process. A server that runs as root and shares read-write with identity of owners lets the guest
make set-user-id programs there: share such a directory only where nobody else runs them.
"""
