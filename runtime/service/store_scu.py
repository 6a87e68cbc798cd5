"""C-STORE as a service class user (PS3.4 B): a PACS that is sent to."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UsageError
from .dicom_receiver import pynetdicom
from .dicom_server import abort_connections
from .send_queue import DeliveryResult, Unreachable

CONNECT, AGREE, ANSWER = (
    3.0,
    10.0,
    120.0,
)  # s that a peer has to take a connection, an association, and to answer for one object
_STORED = (
    0x0000,
    0xB000,
    0xB006,
    0xB007,
    0x0111,
)  # success, stored with a warning (PS3.4 table B.2-1), and there already (PS3.7, annex C)
_PEER = re.compile(
    r"(?P<tls>tls://)?(?P<aet>[^@\\\s][^@\\]{0,15})@(?P<host>\[[0-9A-Fa-f:.]+\]|[^@:/\s]+):(?P<port>\d{1,5})"
)


class StoreSCU:
    """AET@HOST:PORT, or tls://AET@HOST:PORT.

    Raises `UsageError` for what is neither, and for TLS without certificates.
    """

    def __init__(self, text: str, aet: str, tls: ssl.SSLContext | None):
        found = _PEER.fullmatch(text)
        if found is None or not 0 < int(found["port"]) < 65536:
            raise UsageError(
                f"--send-to {text} is no destination",
                expected="AET@HOST:PORT, or tls://AET@HOST:PORT",
                remedy="correct it",
            )
        if found["tls"] and tls is None:
            raise UsageError(
                f"--send-to {text} needs certificates",
                expected="--tls-cert, --tls-key and --tls-ca",
                remedy="give them",
            )
        self.name, self._aet = text, aet
        self._called, self._address = (
            found["aet"].strip(),
            (found["host"].strip("[]"), int(found["port"])),
        )
        self._tls = tls if found["tls"] else None
        self._associations: list[Any] = []  # the one that sends, from its first moment on

    def send(self, files: Sequence[Path]) -> Iterator[DeliveryResult]:
        """What the peer says of each file, in one association, as it says it.

        Raises `Unreachable`.
        """
        from pydicom import dcmread
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

        ae = pynetdicom().AE(ae_title=self._aet)
        ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = (
            CONNECT,
            AGREE,
            ANSWER,
            ANSWER,
        )
        for sop_class in {
            str(dcmread(file, specific_tags=["SOPClassUID"], stop_before_pixels=True).SOPClassUID)
            for file in files
        }:
            for syntax in (
                ExplicitVRLittleEndian,
                ImplicitVRLittleEndian,
            ):  # one each: where both are taken, files go as they are
                ae.add_requested_context(sop_class, syntax)
        tls = None if self._tls is None else (self._tls, self._address[0])
        opened = [(pynetdicom().evt.EVT_CONN_OPEN, self._opened)]
        association = ae.associate(
            *self._address, ae_title=self._called, tls_args=tls, evt_handlers=opened
        )
        try:
            if association.is_rejected:
                raise Unreachable("the association is rejected")
            if not association.is_established:
                raise Unreachable("no association")
            supported = {context.abstract_syntax for context in association.accepted_contexts}
            for file in files:
                ds = dcmread(file)
                if ds.SOPClassUID not in supported:
                    yield DeliveryResult(file, f"{ds.SOPClassUID.name} is not supported there")
                    continue
                status = association.send_c_store(ds).get("Status")
                if status is None:
                    raise Unreachable("the association broke")
                yield DeliveryResult(file, "" if status in _STORED else f"status 0x{status:04X}")
        except RuntimeError as exc:  # pynetdicom's word for an association that ended meanwhile
            raise Unreachable("the association broke") from exc
        finally:
            if association.is_established:
                association.release()
            self._associations.clear()

    def _opened(self, event: Any) -> None:
        event.assoc.dul.socket.socket.settimeout(
            ANSWER
        )  # else who reads no more holds what is written to it for ever
        self._associations.append(event.assoc)

    def stop(self) -> None:
        """End what is on its way, from another thread."""
        abort_connections([*self._associations], abort=True)
