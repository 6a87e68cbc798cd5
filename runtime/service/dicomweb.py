"""STOW-RS (PS3.18, 10.5): a DICOMweb service that is sent to, by the standard library.

Credentials never stand on the command line: MASK2CT_STOW_TOKEN is a bearer token, MASK2CT_STOW_USER
and MASK2CT_STOW_PASSWORD are for basic authentication, else the machine's entry in ~/.netrc. They
are not sent in the clear beyond this machine.
"""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import socket
import ssl
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from ..core.errors import UsageError
from .send_queue import DeliveryResult, Unreachable

ANSWER = 120.0  # s that the service has for one request
AT_ONCE = 16 << 20  # bytes of the objects in one request, unless one alone is larger
THERE = (
    0x0111,
    0xB00E,
)  # failure reasons for what a service has already: an object that we send again is the same one
_REFERENCED, _FAILED, _INSTANCE, _REASON = "00081199", "00081198", "00081155", "00081197"


class DicomWeb:
    """A DICOMweb root, such as https://pacs.example/dicom-web.

    Raises `UsageError` for another URL, and credentials in one.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None):
        wrong = UsageError(
            "--stow is no DICOMweb address",
            expected="http(s)://HOST[:PORT]/ROOT without credentials or a query",
            remedy=(
                "give credentials in MASK2CT_STOW_TOKEN, MASK2CT_STOW_USER and _PASSWORD, or"
                " ~/.netrc"
            ),
        )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise wrong from None
        plain = url.isascii() and url.isprintable() and not set(url) & set(" @?#")
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise wrong
        self.name, self.host = url.rstrip("/"), parts.hostname
        self._port, self._path = port, f"{parts.path.rstrip('/')}/studies"
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._authorization = _credentials(parts.hostname)
        if self._authorization and self._tls is None and not loopback(parts.hostname):
            raise UsageError(
                f"credentials for {parts.hostname} would go in the clear",
                expected="an https address",
                remedy="use https",
            )
        self._connection: http.client.HTTPConnection | None = None

    def send(self, files: Sequence[Path]) -> Iterator[DeliveryResult]:
        """What the service says of each file, in requests of some 16 MiB on one connection.

        Raises `Unreachable`.
        """
        if self._tls is None:
            self._connection = http.client.HTTPConnection(self.host, self._port, timeout=ANSWER)
        else:
            self._connection = http.client.HTTPSConnection(
                self.host, self._port, timeout=ANSWER, context=self._tls
            )
        try:
            for batch in _batches(files):
                yield from self._post(self._connection, batch)
        except (OSError, http.client.HTTPException) as exc:
            raise Unreachable(f"no answer ({type(exc).__name__})") from exc
        finally:
            self._connection.close()
            self._connection = None

    def stop(self) -> None:
        """End what is on its way, from another thread."""
        if (connection := self._connection) is not None:
            with suppress(OSError, AttributeError):  # it is not open
                connection.sock.shutdown(
                    socket.SHUT_RDWR
                )  # wakes who waits for an answer, which closing does not

    def _post(
        self, connection: http.client.HTTPConnection, files: Sequence[Path]
    ) -> Iterator[DeliveryResult]:
        boundary = uuid.uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"--{boundary}--\r\n".encode()
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
            "Content-Length": str(
                sum(len(head) + file.stat().st_size + 2 for file in files) + len(tail)
            ),
        }
        if self._authorization:
            headers["Authorization"] = self._authorization

        def body() -> Iterator[bytes]:
            for file in files:
                yield head
                yield file.read_bytes()
                yield b"\r\n"
            yield tail

        connection.request("POST", self._path, body=body(), headers=headers)
        reply = connection.getresponse()
        said = reply.read(64 << 20)
        if (
            reply.status in (401, 403, 404, 408, 429)
            or reply.status >= 500
            or 300 <= reply.status < 400
        ):
            raise Unreachable(f"HTTP {reply.status}")
        if reply.status == 413 and len(files) > 1:  # too much at once
            for file in files:
                yield from self._post(connection, [file])
            return
        stored, refused = _answer(said)
        for file in files:
            uid = _instance(file)
            if (uid in stored and uid not in refused) or refused.get(uid) in THERE:
                yield DeliveryResult(file, "")
            else:
                yield DeliveryResult(
                    file, f"HTTP {reply.status}, failure reason 0x{refused.get(uid, 0):04X}"
                )


def loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def from_environment() -> bool:
    """Whether the credentials are the environment's, which names no host."""
    return bool(os.environ.get("MASK2CT_STOW_TOKEN") or os.environ.get("MASK2CT_STOW_USER"))


def _credentials(host: str) -> str:
    """The Authorization header for a host, or nothing."""
    if token := os.environ.get("MASK2CT_STOW_TOKEN"):
        return f"Bearer {token}"
    user, password = (
        os.environ.get("MASK2CT_STOW_USER"),
        os.environ.get("MASK2CT_STOW_PASSWORD", ""),
    )
    if not user:
        try:
            found = netrc.netrc().hosts.get(host)
        except FileNotFoundError:
            found = None
        except (OSError, netrc.NetrcParseError) as exc:
            raise UsageError(
                "~/.netrc cannot be read",
                expected="lines as the netrc format has them, for its owner alone",
                remedy="correct it",
            ) from exc
        if found is None:
            return ""
        user, password = found[0], found[2] or ""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _batches(files: Sequence[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for file in files:
        size += file.stat().st_size
        if batch and size > AT_ONCE:
            yield batch
            batch, size = [], file.stat().st_size
        batch.append(file)
    if batch:
        yield batch


def _answer(body: bytes) -> tuple[set[str], dict[str, int]]:
    """SOP Instance UIDs that were stored, and those that were refused with their Failure Reason
    (PS3.18, 10.5.3).
    """

    def value(item: dict[str, dict[str, list[object]]], tag: str) -> object:
        return (item.get(tag, {}).get("Value") or [""])[0]

    try:
        reply = json.loads(body)
        reply = reply[0] if isinstance(reply, list) else reply
        stored = {
            str(value(item, _INSTANCE)) for item in reply.get(_REFERENCED, {}).get("Value", [])
        }
        refused = {
            str(value(item, _INSTANCE)): int(str(value(item, _REASON) or 0))
            for item in reply.get(_FAILED, {}).get("Value", [])
        }
    except (ValueError, AttributeError, TypeError, IndexError, KeyError):
        return set(), {}
    return stored, refused


def _instance(file: Path) -> str:
    from pydicom import dcmread

    return str(
        dcmread(file, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).SOPInstanceUID
    )
