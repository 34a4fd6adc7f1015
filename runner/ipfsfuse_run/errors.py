"""What a run can be refused for, beside the domain's own exceptions: a message is one line that names the
thing."""

from ipfsfuse.errors import IpfsFuseError

COULD_NOT_RUN = 125
"""The exit code where no guest ran, as `env`, `timeout` and docker have it. 1 is a guest's own."""


class GuestRefused(IpfsFuseError):
    """A guest that can't be run: no such file, not WebAssembly, no entry point, an import that nobody
    offers."""


class ReceiptRefused(IpfsFuseError):
    """A receipt that can't be used: cut short, of a newer version, or not what its blocks say."""
