"""Send to a DICOMweb service by STOW-RS (PS3.18 section 10.5), with the standard library alone.

Credentials never stand on the command line. MASK2CT_STOW_TOKEN is a bearer token;
MASK2CT_STOW_USER and MASK2CT_STOW_PASSWORD are for basic authentication; else the host's entry in
~/.netrc counts. They leave this machine encrypted or not at all.
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
AT_ONCE = 16 << 20  # bytes of the objects in one request; a larger object goes alone
# Failure reasons for an object that the service has already. It counts as stored: an object that
# is sent again has the same bytes.
ALREADY_STORED = (0x0111, 0xB00E)
# Tags of the answer: Referenced and Failed SOP Sequence, Referenced SOP Instance UID, Failure
# Reason.
_REFERENCED, _FAILED, _INSTANCE, _REASON = "00081199", "00081198", "00081155", "00081197"


class DicomWeb:
    """A DICOMweb service as a destination.

    Args:
        url: Its root, such as https://pacs.example/dicom-web.
        tls: The context for https; None means the system's authorities.

    Raises:
        UsageError: For another URL, credentials in it, or credentials that would go unencrypted.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None):
        bad_url = UsageError(
            "--stow is not a DICOMweb address",
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
            raise bad_url from None
        plain = url.isascii() and url.isprintable() and not set(url) & set(" @?#")
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise bad_url
        self.name, self.host = url.rstrip("/"), parts.hostname
        self._port, self._path = port, f"{parts.path.rstrip('/')}/studies"
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._authorization = _credentials(parts.hostname)
        if self._authorization and self._tls is None and not loopback(parts.hostname):
            raise UsageError(
                f"credentials for {parts.hostname} would be sent unencrypted",
                expected="an https address",
                remedy="use https",
            )
        self._connection: http.client.HTTPConnection | None = None

    def send(self, files: Sequence[Path]) -> Iterator[DeliveryResult]:
        """Send files, in requests of some 16 MiB on one connection.

        Args:
            files: DICOM files.

        Yields:
            The service's answer for each file.

        Raises:
            Unreachable: When it does not answer, or answers for no file.
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
        """End `send`, from another thread."""
        if (connection := self._connection) is not None:
            with suppress(OSError, AttributeError):  # it is not open
                # A shutdown wakes the thread that waits for an answer; closing would not.
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _post(
        self, connection: http.client.HTTPConnection, files: Sequence[Path]
    ) -> Iterator[DeliveryResult]:
        """Send one request, and yield the answer for each of its files."""
        boundary = uuid.uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"--{boundary}--\r\n".encode()
        length = sum(len(head) + file.stat().st_size + 2 for file in files) + len(tail)
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
            "Content-Length": str(length),
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
        content = reply.read(64 << 20)
        refuses_all = reply.status in (401, 403, 404, 408, 429) or reply.status >= 500
        redirects = 300 <= reply.status < 400
        if refuses_all or redirects:
            raise Unreachable(f"HTTP {reply.status}")
        if reply.status == 413 and len(files) > 1:  # the request was too large
            for file in files:
                yield from self._post(connection, [file])
            return
        stored, refused = _answer(content)
        for file in files:
            uid = _instance(file)
            is_stored = uid in stored and uid not in refused
            if is_stored or refused.get(uid) in ALREADY_STORED:
                yield DeliveryResult(file, "")
            else:
                code = refused.get(uid, 0)
                reason = f"HTTP {reply.status}, failure reason 0x{code:04X}"
                yield DeliveryResult(file, reason)


def loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else.

    Args:
        host: A name or an address.

    Returns:
        True for `localhost` and loopback addresses; other names are not resolved.
    """
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def from_environment() -> bool:
    """Whether the environment has credentials. They name no host, so that each host gets them."""
    return bool(os.environ.get("MASK2CT_STOW_TOKEN") or os.environ.get("MASK2CT_STOW_USER"))


def _credentials(host: str) -> str:
    """Return the Authorization header for a host; empty without credentials."""
    if token := os.environ.get("MASK2CT_STOW_TOKEN"):
        return f"Bearer {token}"
    user = os.environ.get("MASK2CT_STOW_USER")
    password = os.environ.get("MASK2CT_STOW_PASSWORD", "")
    if not user:
        try:
            entry = netrc.netrc().hosts.get(host)
        except FileNotFoundError:
            entry = None
        except (OSError, netrc.NetrcParseError) as exc:
            raise UsageError(
                "~/.netrc cannot be read",
                expected="lines in the netrc format, and a file for its owner alone",
                remedy="correct it",
            ) from exc
        if entry is None:
            return ""
        user, password = entry[0], entry[2] or ""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _batches(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Split files into requests of at most `AT_ONCE` bytes, but of one file at least."""
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
    """Parse the answer to a request (PS3.18 section 10.5.3).

    Returns:
        SOP Instance UIDs of stored objects, and those of refused ones with their Failure Reasons.
        Both are empty when the answer cannot be parsed.
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
    """Return the SOP Instance UID of a file."""
    from pydicom import dcmread

    ds = dcmread(file, specific_tags=["SOPInstanceUID"], stop_before_pixels=True)
    return str(ds.SOPInstanceUID)
