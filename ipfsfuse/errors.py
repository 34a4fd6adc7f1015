"""The domain's exceptions, and nothing else: no errno, no I/O.

Every layer raises these; `fuse.errnos` alone translates them for the kernel and `cli` for people. A message
is one line that names the thing and, where there is something to do, says what.
"""


class IpfsFuseError(Exception):
    """Anything this project says about its own work. A user never sees another exception."""


class UsageError(IpfsFuseError):
    """An argument or a setting that can't be used: exit code 2."""


# -- names and paths -----------------------------------------------------------------------------------------


class NotACid(IpfsFuseError):
    """A text or byte string that is not a CID. Such a name in the mount's root does not exist."""


class NotFound(IpfsFuseError):
    """Proved absent: a verified directory has no such name."""


class NotADirectory(IpfsFuseError):
    """A file or link was used as a directory."""


class IsADirectory(IpfsFuseError):
    """A directory was used as a file."""


class NotALink(IpfsFuseError):
    """readlink of something else."""


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
    """An interior file node that was taken for a leaf, of the right size: the walk must be made again,
    opening every node."""


class Unsupported(IpfsFuseError):
    """A codec that is not shown, or a hash function that is not allowed."""


class NotInstalled(Unsupported):
    """An optional part whose packages are missing."""


class Unavailable(IpfsFuseError):
    """No source gave the block before the deadline (at once where the mount is offline)."""


class Interrupted(IpfsFuseError):
    """The caller was interrupted while it waited."""


class BlockTooLarge(IpfsFuseError):
    """One source has the block, of more bytes than a block may have. Nobody needs to ask that source for it
    again.

    Sources make it with `sources.base.too_large`, whose message names the source, the CID and the size."""


# -- sources -------------------------------------------------------------------------------------------------


class NotHere(IpfsFuseError):
    """One source does not have the block: no answer about any other source."""


class SourceFailed(IpfsFuseError):
    """One source could not answer. `kind` is a short word for counting: connect, timeout, status, short, tls,
    ..."""

    def __init__(self, message: str, kind: str = "failed", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
        """Seconds the source asked us to stay away, where it did."""


class QuotaReached(SourceFailed):
    """This mount has fetched as many bytes as it may (--max-fetch)."""


# -- the local machine ---------------------------------------------------------------------------------------


class StoreFailed(IpfsFuseError):
    """The cache folder or the library can't be used: the disk is full, read-only, gone, or not ours alone."""


class FolderInUse(StoreFailed):
    """Another daemon has the cache folder. Exit code 75 (EX_TEMPFAIL of sysexits.h): it may be free later."""


class AddFailed(IpfsFuseError):
    """A file or folder that can't be added: not there, not readable, of another kind, or changed while it was
    read."""


class MountFailed(IpfsFuseError):
    """The mount can't be made: the mountpoint, /dev/fuse, fusermount3, or a setting stands in the way."""


class DaemonFailed(IpfsFuseError):
    """A running mount did not answer, or there is none."""
