"""Send to a PACS by C-STORE, as a service class user (PS3.4 annex B)."""

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

# s that a peer has to accept a connection, an association, and to answer for one object.
CONNECT, AGREE, ANSWER = 3.0, 10.0, 120.0
_STORED = (
    0x0000,  # success
    *(0xB000, 0xB006, 0xB007),  # stored, with a warning (PS3.4 table B.2-1)
    0x0111,  # stored earlier: duplicate SOP instance (PS3.7 annex C)
)
_PEER = re.compile(
    r"(?P<tls>tls://)?(?P<aet>[^@\\\s][^@\\]{0,15})"
    r"@(?P<host>\[[0-9A-Fa-f:.]+\]|[^@:/\s]+):(?P<port>\d{1,5})"
)


class StoreSCU:
    """A PACS as a destination.

    Args:
        text: AET@HOST:PORT, or tls://AET@HOST:PORT.
        aet: This node's AE title.
        tls: The context for TLS; None without certificates.

    Raises:
        UsageError: For another text, and for TLS without certificates.
    """

    def __init__(self, text: str, aet: str, tls: ssl.SSLContext | None):
        peer = _PEER.fullmatch(text)
        if peer is None or not 0 < int(peer["port"]) < 65536:
            raise UsageError(
                f"--send-to {text} is not a destination",
                expected="AET@HOST:PORT, or tls://AET@HOST:PORT",
                remedy="correct it",
            )
        if peer["tls"] and tls is None:
            raise UsageError(
                f"--send-to {text} needs certificates",
                expected="--tls-cert, --tls-key and --tls-ca",
                remedy="give them",
            )
        self.name, self._aet = text, aet
        self._called_aet = peer["aet"].strip()
        self._address = peer["host"].strip("[]"), int(peer["port"])
        self._tls = tls if peer["tls"] else None
        # The association that sends, from its first moment on.
        self._associations: list[Any] = []

    def send(self, files: Sequence[Path]) -> Iterator[DeliveryResult]:
        """Send files in one association.

        Args:
            files: DICOM files.

        Yields:
            The peer's answer for each file, as it comes.

        Raises:
            Unreachable: When there is no association, or it ends before the last answer.
        """
        from pydicom import dcmread
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

        ae = pynetdicom().AE(ae_title=self._aet)
        ae.connection_timeout, ae.acse_timeout = CONNECT, AGREE
        ae.dimse_timeout = ae.network_timeout = ANSWER
        sop_classes = {
            str(dcmread(file, specific_tags=["SOPClassUID"], stop_before_pixels=True).SOPClassUID)
            for file in files
        }
        for sop_class in sop_classes:
            # A context for each syntax: a peer that takes both receives the files as they are.
            for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
                ae.add_requested_context(sop_class, syntax)
        tls = None if self._tls is None else (self._tls, self._address[0])
        handlers = [(pynetdicom().evt.EVT_CONN_OPEN, self._connected)]
        association = ae.associate(
            *self._address, ae_title=self._called_aet, tls_args=tls, evt_handlers=handlers
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
        except RuntimeError as exc:  # pynetdicom's error when the association has ended
            raise Unreachable("the association broke") from exc
        finally:
            if association.is_established:
                association.release()
            self._associations.clear()

    def _connected(self, event: Any) -> None:
        """Note the association, and bound how long a peer that reads nothing blocks a write."""
        event.assoc.dul.socket.socket.settimeout(ANSWER)
        self._associations.append(event.assoc)

    def stop(self) -> None:
        """End `send`, from another thread."""
        abort_connections([*self._associations], abort=True)
