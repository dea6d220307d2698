import errno
import fcntl
import os
import struct

MIB = 1 << 20


def handler(event, context):
    return globals()[event["do"]](event)


def written(size):
    """Writes a file of so many MiB. How many of them it took, and why no more."""
    took, why = 0, None
    with open("/tmp/file", "wb", buffering=0) as file:
        try:
            while took < size:
                # What has less room is written in part, and refused the next time.
                took += file.write(took.to_bytes(4, "big") * (MIB // 4)) == MIB
        except OSError as error:
            why = errno.errorcode[error.errno]
    return took, why


def write(event):
    took, why = written(event["mib"])
    wrong = 0
    with open("/tmp/file", "rb") as file:
        for number in range(took):
            wrong += file.read(MIB) != number.to_bytes(4, "big") * (MIB // 4)
    return [took, why, wrong]


def reserve(event):
    """Makes /tmp/reserved so many MiB large, without a write."""
    with open("/tmp/reserved", "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, event["mib"] * MIB)
        except OSError as error:
            return errno.errorcode[error.errno]


def make_files(event):
    """A chain of folders and many files. Why there are no more of them."""
    os.chdir("/tmp")
    for _ in range(event["depth"]):
        os.mkdir("folder")
        os.chdir("folder")
    os.chdir("/tmp")
    try:
        for number in range(event["files"]):
            os.close(os.open(f"{number}", os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        return errno.errorcode[error.errno]


def link_files(event):
    """Names without files. Whose /tmp is, and why there are no more of them."""
    open("/tmp/one", "w").close()
    owner = os.stat("/tmp").st_uid == os.getuid()
    try:
        for number in range(60_000):
            os.link("/tmp/one", f"/tmp/{number:0250}")
    except OSError as error:
        return [owner, errno.errorcode[error.errno]]
    return [owner, None]


def scatter(event):
    """Reserves so many MiB, and writes single blocks, each of which takes more for where it is. Why there are no more."""
    reserve(event)
    # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of linux/fs.h, EXT4_EXTENTS_FL of fs/ext4/ext4.h.
    get_flags, set_flags, extents = 0x80086601, 0x40086602, 0x80000
    with open("/tmp/scattered", "wb", buffering=0) as file:
        (flags,) = struct.unpack("l", fcntl.ioctl(file, get_flags, bytes(8)))
        fcntl.ioctl(file, set_flags, struct.pack("l", flags & ~extents))
        try:
            for number in range(20_000):
                os.pwrite(file.fileno(), bytes(4096), number * 5 * MIB)
        except OSError as error:
            return errno.errorcode[error.errno]


def give_away(event):
    open("/tmp/given", "w").close()
    refused = []
    for path in ("/tmp/given", "/tmp"):
        try:
            os.chown(path, 0, 0)
        except OSError as error:
            refused.append(errno.errorcode[error.errno])
    return refused


def look(event):
    return sorted(os.listdir("/tmp"))
