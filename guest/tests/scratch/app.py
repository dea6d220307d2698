import errno
import os

MIB = 1 << 20


def handler(event, context):
    return globals()[event["do"]](event)


def written(size):
    """Writes a file of so many MiB. How many of them it took, and why no more."""
    took, why = 0, None
    with open("/tmp/file", "wb", buffering=0) as file:
        try:
            while took < size:
                file.write(took.to_bytes(4, "big") * (MIB // 4))
                took += 1
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
    """Makes /tmp/file so many MiB large, without a write."""
    with open("/tmp/file", "wb") as file:
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
