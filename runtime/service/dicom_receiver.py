"""Receive objects by C-STORE, as a service class provider on pynetdicom (PS3.4 annex B).

It also answers C-ECHO (PS3.4 annex A), and bounds what a peer can make it hold.
"""

from __future__ import annotations

import logging
import ssl
import sys
import threading
import time
from typing import Any

from ..core.errors import InputError, OutputError, UsageError, importing
from ..io.dicom.files import RTSTRUCT, SEGMENTATION
from .dicom_server import Limits, abort_connections, server_class
from .events import Events
from .study_spool import NoMatch, Spool

# Status codes of C-STORE (PS3.4 table B.2-1).
SUCCESS, OUT_OF_RESOURCES, NO_MATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000
# CT, MR and PET images, on whose grid contours are drawn.
IMAGES = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.128",
)
LONGEST_COMMAND = 1 << 16  # bytes of a DIMSE command set
# Messages of one association. A peer that keeps to PS3.7 D.3.3.3 waits for each answer.
MOST_UNANSWERED = 100
# An object up to this many times the limit is received to its end, to be refused by an answer; a
# larger one ends the association.
RECEIVED_TO_ANSWER = 4


def pynetdicom() -> Any:
    """Import pynetdicom, and silence its log.

    Returns:
        The module.

    Raises:
        MissingComponent: When it is not installed.
    """
    with importing(
        "pynetdicom", "pynetdicom, which speaks DICOM over a network", 'pip install "mask2ct[node]"'
    ):
        import pynetdicom
        import pynetdicom._config
    # Its log quotes data sets.
    pynetdicom._config.LOG_HANDLER_LEVEL = "none"
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    return pynetdicom


class StoreSCP:
    """Listens for associations until it is closed.

    Args:
        spool: Stores the objects.
        events: Receives what happens.
        aet: This node's AE title.
        address: Host and port; port 0 is any free port.
        allow: Calling AE titles; empty means any.
        limits: What the node gives to its peers.
        tls: The context for TLS; None without TLS.

    Raises:
        UsageError: When the address cannot be used.
    """

    def __init__(
        self,
        spool: Spool,
        events: Events,
        aet: str,
        address: tuple[str, int],
        allow: tuple[str, ...],
        limits: Limits,
        tls: ssl.SSLContext | None,
    ):
        self._spool, self._events, self._allow = spool, events, allow
        self._aet, self._limits = aet, limits
        # Associations whose present object is larger than the limit.
        self._too_large: set[Any] = set()
        # By association: when its present object began (monotonic s), and the bytes since then.
        self._received: dict[Any, tuple[float, int]] = {}
        evt, ae = pynetdicom().evt, pynetdicom().AE(ae_title=aet)
        # The server counts associations itself, before pynetdicom begins.
        ae.maximum_associations = sys.maxsize
        ae.maximum_pdu_size = limits.pdu
        ae.acse_timeout = limits.request_seconds
        ae.dimse_timeout = ae.network_timeout = limits.idle_seconds
        _support(ae)
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, self._echo),
            (evt.EVT_PDU_RECV, self._measure),
            (evt.EVT_ACCEPTED, self._accepted),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        try:
            self._server = ae.make_server(
                address,
                evt_handlers=handlers,
                server_class=server_class(events, aet, allow, limits, tls),
            )
        except OSError as exc:
            raise UsageError(
                f"{address[0]} port {address[1]} cannot be had: {exc.strerror}",
                expected="an address of this machine and a free port",
                remedy="choose another --port",
            ) from exc
        # `AE.start_server` does the same: the server's shutdown removes it from this list.
        ae._servers.append(self._server)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), daemon=True, name="store-scp"
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def wrong(self) -> str:
        """Return why no peer gets an association; empty when all is well."""
        if not self._thread.is_alive():
            return "the thread that takes connections has ended"
        if self._server.shortage:
            return f"no connection can be taken: {self._server.shortage}"
        if self._server.places_taken >= self._limits.associations:
            return f"all {self._limits.associations} associations are taken"
        return ""

    def close(self) -> None:
        """End listening and every association.

        Nothing is lost: the sender keeps an object until it is acknowledged.
        """
        self._server.shutdown()
        self._server.pending.end_all()
        abort_connections(self._server.active_associations, abort=True)

    def _store(self, event: Any) -> int:
        """Answer a C-STORE request with its status."""
        request, association = event.request, event.assoc
        peer = self._peer(association)
        data = request.DataSet
        size = data.getbuffer().nbytes
        # the last PDU of an object is not measured before it is here
        if association in self._too_large or size > self._limits.size:
            self._too_large.discard(association)
            return self._refuse(
                OUT_OF_RESOURCES, peer, f"the object is larger than {self._limits.size} bytes"
            )
        meta = event.file_meta

        def write(handle: Any) -> None:
            from pydicom.filewriter import write_file_meta_info

            handle.write(bytes(128) + b"DICM")
            write_file_meta_info(handle, meta)
            handle.write(data.getbuffer())

        try:
            claimed = (str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID))
            study = self._spool.receive(write, claimed, size, threading.current_thread())
        except NoMatch as exc:
            return self._refuse(NO_MATCH, peer, exc.fact)
        except InputError as exc:
            return self._refuse(CANNOT_UNDERSTAND, peer, exc.fact)
        except (OutputError, MemoryError) as exc:
            return self._refuse(OUT_OF_RESOURCES, peer, getattr(exc, "fact", "out of memory"))
        except Exception as exc:  # a peer's data must not end the association without an answer
            return self._refuse(CANNOT_UNDERSTAND, peer, type(exc).__name__)
        self._events("stored", peer=peer, study=study, bytes=size)
        return SUCCESS

    def _refuse(self, status: int, peer: str, reason: str) -> int:
        self._events("refused", peer=peer, status=f"0x{status:04X}", reason=reason)
        return status

    def _echo(self, event: Any) -> int:
        self._events("echo", peer=self._peer(event.assoc))
        return SUCCESS

    def _measure(self, event: Any) -> None:
        """Bound an association's memory and time, before each of its PDUs is processed.

        An object beyond the limit is received to its end, since only then it can be answered, but
        its bytes are dropped. An object without an end, and messages that come faster than their
        answers, end the association.
        """
        association, message = event.assoc, event.assoc.dimse.message
        if association.dimse.msg_queue.qsize() > MOST_UNANSWERED:
            association.abort(block=False)
            return
        if message is None:  # this PDU begins one
            self._received[association] = time.monotonic(), 0
            return
        began, received = self._received.get(association, (time.monotonic(), 0))
        received += event.pdu.pdu_length
        self._received[association] = began, received
        seconds_allowed = self._limits.idle_seconds + received / self._limits.slowest
        too_slow = time.monotonic() - began > seconds_allowed
        endless = received > RECEIVED_TO_ANSWER * self._limits.size + LONGEST_COMMAND
        if too_slow or endless or message.encoded_command_set.tell() > LONGEST_COMMAND:
            association.abort(block=False)
        elif message.data_set is not None and message.data_set.tell() > self._limits.size:
            self._too_large.add(association)
        if association in self._too_large and message.data_set is not None:
            message.data_set.seek(0)
            message.data_set.truncate()

    def _accepted(self, event: Any) -> None:
        """Report the SOP classes of a new association that this node does not support.

        A UID that the standard does not have might be anything: it is not quoted.
        """
        from pydicom.uid import UID

        rejected = {UID(context.abstract_syntax) for context in event.assoc.rejected_contexts}
        if rejected:
            names = sorted(uid.name if uid.name != str(uid) else "unknown" for uid in rejected)
            self._events(
                "not-supported",
                peer=self._peer(event.assoc),
                classes=len(rejected),
                such_as=names[0],
            )

    def _closed(self, event: Any) -> None:
        """Forget an association that has ended."""
        self._too_large.discard(event.assoc)
        self._received.pop(event.assoc, None)
        if not event.assoc.is_released:
            self._events("broken", reason="the association ended without a release")

    def _peer(self, association: Any) -> str:
        """Return the calling AE title if it is an allowed one, else "any".

        It becomes a label of a counter, which a stranger must not choose.
        """
        title = str(association.requestor.ae_title).strip()
        return title if title in self._allow else "any"


def _support(ae: Any) -> None:
    """Add the SOP classes and transfer syntaxes that this node accepts."""
    from pydicom import uid

    plain_syntaxes = [
        uid.ExplicitVRLittleEndian,
        uid.ImplicitVRLittleEndian,
        uid.DeflatedExplicitVRLittleEndian,
    ]
    ae.add_supported_context("1.2.840.10008.1.1")  # Verification
    for sop_class in (*SEGMENTATION, RTSTRUCT):
        ae.add_supported_context(sop_class, [*plain_syntaxes, uid.RLELossless])
    compressed = [
        uid.RLELossless,
        uid.JPEGBaseline8Bit,
        uid.JPEGExtended12Bit,
        uid.JPEGLossless,
        uid.JPEGLosslessSV1,
        uid.JPEGLSLossless,
        uid.JPEGLSNearLossless,
        uid.JPEG2000Lossless,
        uid.JPEG2000,
    ]
    # Compressed as well: only the position of an image is read, and never its pixels.
    for sop_class in IMAGES:
        ae.add_supported_context(sop_class, [*plain_syntaxes, *compressed])
