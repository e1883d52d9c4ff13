"""A program for the guest: random operations on files of a shared directory, each checked against what it must leave.

After the idea of Apple's fsx (file system exerciser): reads, writes, appends, truncations, holes, copies, shared mappings and dropped caches on
a few files, with a model of each in memory. ``fsx.py DIRECTORY SEED COUNT`` prints each file's SHA-256 when all went well.
"""

import ctypes
import hashlib
import mmap
import os
import random
import sys

SIZE = 300_000
FILES = 3
_libc = ctypes.CDLL(None, use_errno=True)


class Checked:
    """A file and its model."""

    def __init__(self, path: str, rng: random.Random) -> None:
        self.path, self.rng = path, rng
        self.model = bytearray()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.note = ""

    def span(self, limit: int = SIZE) -> tuple[int, int]:
        offset = self.rng.randrange(limit)
        return offset, self.rng.randrange(
            1, min(limit - offset, self.rng.choice([10, 5000, 70_000, SIZE])) + 1
        )

    def put(self, offset: int, data: bytes) -> None:
        if offset > len(self.model):
            self.model += bytes(offset - len(self.model))
        self.model[offset : offset + len(data)] = data

    def expect(self, got: bytes, offset: int, size: int) -> None:
        wanted = bytes(self.model[offset : offset + size])
        if got != wanted:
            first = next(
                (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
                min(len(got), len(wanted)),
            )
            sys.exit(
                f"{self.path}: {len(got)} of {len(wanted)} bytes at {offset}, the first wrong one at {offset + first}"
            )

    def write(self) -> None:
        offset, size = self.span()
        data = self.rng.randbytes(size)
        done = os.pwrite(self.fd, data, offset)
        self.put(offset, data[:done])

    def append(self) -> None:
        if len(self.model) < SIZE:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            data = self.rng.randbytes(self.rng.randrange(1, 5000))
            os.write(fd, data)
            os.close(fd)
            self.put(len(self.model), data)

    def read(self) -> None:
        offset, size = self.span()
        self.expect(os.pread(self.fd, size, offset), offset, size)

    def truncate(self) -> None:
        size = self.rng.randrange(SIZE)
        if self.rng.random() < 0.5:
            os.ftruncate(self.fd, size)
        else:
            os.truncate(self.path, size)
        del self.model[size:]
        self.put(size, b"")

    def map(self) -> None:
        if self.model:
            offset, size = self.span(len(self.model))
            with mmap.mmap(self.fd, len(self.model)) as view:
                self.expect(view[offset : offset + size], offset, size)
                if self.rng.random() < 0.7:
                    data = self.rng.randbytes(size)
                    view[offset : offset + size] = data
                    self.put(offset, data)
                    if self.rng.random() < 0.3:
                        view.flush()

    def allocate(self) -> None:
        offset, size = self.span()
        punch = self.rng.random() < 0.7
        where = ctypes.c_int64(offset), ctypes.c_int64(size)
        if _libc.fallocate(self.fd, 3 if punch else 0, *where):
            sys.exit(f"fallocate: {os.strerror(ctypes.get_errno())}")
        if not punch:
            self.put(max(offset + size, len(self.model)), b"")
        elif offset < len(self.model):
            self.put(offset, bytes(min(size, len(self.model) - offset)))

    def copy(self) -> None:
        if self.model:
            offset, size = self.span(len(self.model))
            to = self.rng.randrange(SIZE)
            if not (to < offset + size and offset < to + size):
                done = os.copy_file_range(self.fd, self.fd, size, offset, to)
                self.put(to, bytes(self.model[offset : offset + done]))

    def sync(self) -> None:
        self.rng.choice([os.fsync, os.fdatasync])(self.fd)

    def reopen(self) -> None:
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)

    def rename(self) -> None:
        name = self.path + "'" if not self.path.endswith("'") else self.path[:-1]
        os.rename(self.path, name)
        self.path = name

    def size(self) -> None:
        for st in (os.fstat(self.fd), os.stat(self.path)):
            if st.st_size != len(self.model):
                sys.exit(f"{self.path}: {st.st_size} bytes instead of {len(self.model)}")

    def drop_caches(self) -> None:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")

    def step(self) -> None:
        often = [
            self.write,
            self.read,
            self.map,
            self.truncate,
            self.allocate,
            self.copy,
            self.size,
            self.append,
        ]
        seldom = [self.sync, self.reopen, self.rename, self.drop_caches]
        self.rng.choice(often if self.rng.random() < 0.9 else seldom)()


def main(directory: str, seed: int, count: int) -> None:
    rng = random.Random(seed)
    files = [Checked(f"{directory}/file{i}", rng) for i in range(FILES)]
    for _ in range(count):
        rng.choice(files).step()
    for file in files:
        file.expect(os.pread(file.fd, 2 * SIZE, 0), 0, 2 * SIZE)
        os.close(file.fd)
        print(os.path.basename(file.path), hashlib.sha256(file.model).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
