"""A certificate authority of the test's own, made with the openssl program.

Concurrency: blocking.
"""

import ssl
import subprocess
from pathlib import Path

EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def _openssl(*args: str | Path) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


def _expired_options() -> list[str]:
    """The options that make an expired certificate: dates for OpenSSL 3.4 and later, negative days before."""
    shown = subprocess.run(["openssl", "x509", "-help"], check=True, capture_output=True, text=True)
    takes_dates = "-not_after" in shown.stdout + shown.stderr
    return (
        ["-not_before", "20200101000000Z", "-not_after", "20200102000000Z"]
        if takes_dates
        else ["-days", "-1"]
    )


class Authority:
    """`certificate` is the file to trust."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key, self.certificate = folder / "ca.key", folder / "ca.pem"
        # required since OpenSSL 3.5 and Python 3.13
        key_usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        _openssl(
            "req",
            "-x509",
            *EC,
            "-days",
            "2",
            "-subj",
            "/CN=test authority",
            *key_usage,
            "-keyout",
            self._key,
            "-out",
            self.certificate,
        )

    def server_context(self, name: str, days: int = 2) -> ssl.SSLContext:
        """The context of a server with the name `name` (`DNS:host` or `IP:address`). With negative `days` its
        certificate has expired."""
        key, request, certificate, names = (
            self._folder / f"server.{end}" for end in ("key", "csr", "pem", "ext")
        )
        names.write_text(f"subjectAltName={name}\n")
        _openssl("req", *EC, "-subj", "/CN=server", "-keyout", key, "-out", request)
        issuer = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial")
        sign = ("x509", "-req", "-in", request, *issuer, "-extfile", names, "-out", certificate)
        if days > 0:
            _openssl(*sign, "-days", str(days))
        else:
            _openssl(*sign, *_expired_options())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context
