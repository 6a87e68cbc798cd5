"""The C-STORE and C-ECHO service class provider (PS3.4 B, A), on pynetdicom: whom it talks to,
what it takes, how much of it.
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

SUCCESS, OUT_OF_RESOURCES, NO_MATCH, CANNOT_UNDERSTAND = (
    0x0000,
    0xA700,
    0xA900,
    0xC000,
)  # PS3.4 table B.2-1
IMAGES = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.128",
)  # CT, MR, PET: what contours lie on
LONGEST_COMMAND = 1 << 16  # bytes of a DIMSE command set
MOST_UNANSWERED = 100  # messages of one association; who keeps to PS3.7 D.3.3.3 awaits each answer
RECEIVED_TO_ANSWER = (
    4  # times the largest object: of a larger one the end is not waited for, to refuse it
)


def pynetdicom() -> Any:
    """The pynetdicom module, silent. Raises `MissingComponent` when it is not installed."""
    with importing(
        "pynetdicom", "pynetdicom, which speaks DICOM over a network", 'pip install "mask2ct[node]"'
    ):
        import pynetdicom
        import pynetdicom._config
    pynetdicom._config.LOG_HANDLER_LEVEL = "none"  # what it logs quotes data sets
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    return pynetdicom


class StoreSCP:
    """Listens until it is closed.

    `allow`: calling AE titles; empty means any. Raises `UsageError` when the port cannot be had.
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
        self._spool, self._events, self._allow, self._aet, self._limits = (
            spool,
            events,
            allow,
            aet,
            limits,
        )
        self._cut: set[Any] = set()  # associations whose present object is larger than it may be
        self._began: dict[
            Any, tuple[float, int]
        ] = {}  # association → when its present object began, and the bytes since
        evt, ae = pynetdicom().evt, pynetdicom().AE(ae_title=aet)
        ae.maximum_associations = (
            sys.maxsize
        )  # the server counts places itself, before pynetdicom begins
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
        ae._servers.append(self._server)  # as `start_server` does: its shutdown takes itself out
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), daemon=True, name="acceptor"
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def wrong(self) -> str:
        """Why nobody gets in, or nothing."""
        if not self._thread.is_alive():
            return "the thread that takes connections has ended"
        if self._server.shortage:
            return f"no connection can be taken: {self._server.shortage}"
        if self._server.places_taken >= self._limits.associations:
            return f"all {self._limits.associations} associations are taken"
        return ""

    def close(self) -> None:
        """Listen no more and end every association: what was not acknowledged its sender still
        has.
        """
        self._server.shutdown()
        self._server.pending.end_all()
        abort_connections(self._server.active_associations, abort=True)

    def _store(self, event: Any) -> int:
        request, association = event.request, event.assoc
        who = self._peer(association)
        if association in self._cut:
            self._cut.discard(association)
            return self._refuse(
                OUT_OF_RESOURCES, who, f"the object is larger than {self._limits.size} bytes"
            )
        data = request.DataSet
        size = data.getbuffer().nbytes
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
            return self._refuse(NO_MATCH, who, exc.fact)
        except InputError as exc:
            return self._refuse(CANNOT_UNDERSTAND, who, exc.fact)
        except (OutputError, MemoryError) as exc:
            return self._refuse(OUT_OF_RESOURCES, who, getattr(exc, "fact", "out of memory"))
        except Exception as exc:  # a peer's data must not end the association without an answer
            return self._refuse(CANNOT_UNDERSTAND, who, type(exc).__name__)
        self._events("stored", peer=who, study=study, bytes=size)
        return SUCCESS

    def _refuse(self, status: int, who: str, reason: str) -> int:
        self._events("refused", peer=who, status=f"0x{status:04X}", reason=reason)
        return status

    def _echo(self, event: Any) -> int:
        self._events("echo", peer=self._peer(event.assoc))
        return SUCCESS

    def _measure(self, event: Any) -> None:
        """Before each PDU is taken in: bound what its association takes of memory and time.

        An object beyond the limit is received to its end, since only then it can be answered, but
        not kept. One without an end, and messages that come faster than they are answered, end the
        association.
        """
        association, message = event.assoc, event.assoc.dimse.message
        if association.dimse.msg_queue.qsize() > MOST_UNANSWERED:
            association.abort(block=False)
            return
        if message is None:  # this PDU begins one
            self._began[association] = time.monotonic(), 0
            return
        began, received = self._began.get(association, (time.monotonic(), 0))
        received += event.pdu.pdu_length
        self._began[association] = began, received
        too_slow = (
            time.monotonic() - began > self._limits.idle_seconds + received / self._limits.slowest
        )
        endless = received > RECEIVED_TO_ANSWER * self._limits.size + LONGEST_COMMAND
        if too_slow or endless or message.encoded_command_set.tell() > LONGEST_COMMAND:
            association.abort(block=False)
        elif message.data_set is not None and message.data_set.tell() > self._limits.size:
            self._cut.add(association)
        if association in self._cut and message.data_set is not None:
            message.data_set.seek(0)
            message.data_set.truncate()

    def _accepted(self, event: Any) -> None:
        """One line for the SOP classes that were offered in vain.

        A UID that is none of the standard's might be anything: it is not quoted.
        """
        from pydicom.uid import UID

        offered = {UID(context.abstract_syntax) for context in event.assoc.rejected_contexts}
        if offered:
            names = sorted(uid.name if uid.name != str(uid) else "unknown" for uid in offered)
            self._events(
                "not-supported",
                peer=self._peer(event.assoc),
                classes=len(offered),
                such_as=names[0],
            )

    def _closed(self, event: Any) -> None:
        self._cut.discard(event.assoc)
        self._began.pop(event.assoc, None)
        if not event.assoc.is_released:
            self._events("broken", reason="the association ended without a release")

    def _peer(self, association: Any) -> str:
        """The calling AE title, where it is one of those allowed: a label of a counter must not
        be a stranger's choice.
        """
        title = str(association.requestor.ae_title).strip()
        return title if title in self._allow else "any"


def _support(ae: Any) -> None:
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
    for sop_class in IMAGES:  # only where their slices lie is read
        ae.add_supported_context(sop_class, [*plain_syntaxes, *compressed])
