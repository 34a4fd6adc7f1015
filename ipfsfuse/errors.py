"""The exceptions of this project.

Every layer raises them. `fuse.errnos` translates them into errnos, and `cli` into messages. A message is one
line. It names the subject of the error and, if possible, what to do.
"""


class IpfsFuseError(Exception):
    """The base class. Users never see another exception."""


class UsageError(IpfsFuseError):
    """An argument or a setting that can't be used: exit code 2."""


# -- names and paths -----------------------------------------------------------------------------------------


class NotACid(IpfsFuseError):
    """A text or byte string that is not a CID. In the mount's root, such a name does not exist."""


class NotFound(IpfsFuseError):
    """A verified directory proves that there is no such entry."""


class NotADirectory(IpfsFuseError):
    """A file or link was used as a directory."""


class IsADirectory(IpfsFuseError):
    """A directory was used as a file."""


class NotALink(IpfsFuseError):
    """readlink of a file or a directory."""


class NameTooLong(IpfsFuseError):
    """A name of over 255 bytes."""


class NotAllowed(IpfsFuseError):
    """A CID outside the allow-list of this mount."""


class ReadOnly(IpfsFuseError):
    """A call that would change something."""


class WrongRecord(IpfsFuseError):
    """An IPNS record that the specification refuses: malformed, of another key, or wrongly signed."""


# -- blocks --------------------------------------------------------------------------------------------------


class WrongBlock(IpfsFuseError):
    """Bytes that do not match their CID."""


class Malformed(IpfsFuseError):
    """Bytes that match their CID and break the format's rules."""


class NotALeaf(Malformed):
    """An interior file node that was taken for a leaf, of the right size. Repeat the walk, and expand every
    node."""


class Unsupported(IpfsFuseError):
    """A codec that is not shown, or a hash function that is not allowed."""


class NotInstalled(Unsupported):
    """An optional part whose packages are missing."""


class Unavailable(IpfsFuseError):
    """No source gave the block before the deadline. Raised at once if the mount is offline."""


class Interrupted(IpfsFuseError):
    """The caller was interrupted while it waited."""


class BlockTooLarge(IpfsFuseError):
    """One source has a block that is larger than the limit. That source need not be asked for it again.

    Sources make this error with `cid.too_large`, so that the message names source, CID and size."""


# -- sources -------------------------------------------------------------------------------------------------


class NotHere(IpfsFuseError):
    """One source does not have the block. Another may have it."""


class SourceFailed(IpfsFuseError):
    """One source could not answer. `kind` is a short word for counting: connect, timeout, status, short, tls,
    ..."""

    def __init__(self, message: str, kind: str = "failed", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
        """Seconds for which the source asked for no requests; None if it did not."""


class QuotaReached(SourceFailed):
    """This mount has fetched as many bytes as it may (--max-fetch)."""


# -- the local machine ---------------------------------------------------------------------------------------


class StoreFailed(IpfsFuseError):
    """The cache folder or the library can't be used: the disk is full, read-only or gone, or other users can
    change the folder."""


class FolderInUse(StoreFailed):
    """Another daemon has the cache folder. Exit code 75 (EX_TEMPFAIL of sysexits.h): it may be free later."""


class AddFailed(IpfsFuseError):
    """A file or folder can't be added: it is missing, not readable, of another kind, or changed while it was
    read."""


class MountFailed(IpfsFuseError):
    """The mount can't be made because of the mountpoint, /dev/fuse, fusermount3 or a setting."""


class DaemonFailed(IpfsFuseError):
    """A running mount did not answer, or there is none."""
