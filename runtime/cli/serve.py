"""`mask2ct serve`: a DICOM node that receives masks, synthesizes CTs and sends them on."""

from __future__ import annotations

import argparse
import gc
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..batch.audit_log import AUDIT, AuditTrail, Facts
from ..batch.model_router import Models
from ..batch.runner import CaseResult
from ..core.atomic_files import open_input
from ..core.console import epilog
from ..core.errors import UsageError, reading
from ..core.log import events_on_standard_error
from ..core.stopping import ends_when_told
from ..engines.memory import parse_bytes
from ..io.cases import Case
from ..service.dicom_node import END, Node
from ..service.dicom_receiver import StoreSCP, pynetdicom
from ..service.dicom_server import Limits
from ..service.dicomweb import DicomWeb, from_environment, loopback
from ..service.events import Events
from ..service.health_server import HealthServer
from ..service.send_queue import Destination, SendQueue
from ..service.store_scu import StoreSCU
from ..service.study_spool import Spool
from .masks import find
from .models import open_models, plans_by_model, synthesize_cases
from .options import (
    add_audit,
    add_engine,
    add_making,
    add_reading,
)

LOOPBACK = "127.0.0.1"


def add(commands: Any) -> None:
    """Add `serve` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    serve = commands.add_parser(
        "serve",
        epilog=epilog(
            "mask2ct serve --model MODEL --spool SPOOL --send-to PACS@pacs.example:11112",
            notes="serve ends with 0 when Ctrl-C or SIGTERM stops it, and the next start goes on\n"
            "with the studies in the spool",
        ),
    )
    serve.set_defaults(command=_serve, format="dicom")
    add_engine(serve)
    serve.add_argument(
        "--spool",
        type=Path,
        required=True,
        metavar="DIR",
        help="the spool: the folder of studies that have arrived and are not yet sent on",
    )
    add_audit(serve, f"{AUDIT} in DIR")
    serve.add_argument(
        "--keep",
        action="store_true",
        help="keep masks and results in DIR/done after they have been sent",
    )
    serve.add_argument(
        "--quiet-period",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help=(
            "a study is complete when none of its objects has arrived for this long (default:"
            " %(default)s)"
        ),
    )
    _add_listening(serve.add_argument_group("receiving"))
    _add_sending(serve.add_argument_group("sending"))
    add_making(serve.add_argument_group("results"))
    add_reading(serve)


def _add_listening(group: argparse._ArgumentGroup) -> None:
    """Add the options of the port, and of the peers that may use it."""
    group.add_argument(
        "--aet", default="MASK2CT", help="this node's AE title (default: %(default)s)"
    )
    group.add_argument(
        "--host",
        default=LOOPBACK,
        help="the address to listen on (default: %(default)s, which only this machine can reach)",
    )
    group.add_argument(
        "--port",
        type=_port,
        default=11112,
        help="the DICOM port (default: %(default)s; 0: a free port, which the first lines name)",
    )
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="AET",
        help="accept this calling AE title; repeatable",
    )
    group.add_argument("--allow-any", action="store_true", help="accept every calling AE title")
    group.add_argument(
        "--max-associations",
        type=int,
        default=Limits.associations,
        metavar="N",
        help="accept at most N associations at once (default: %(default)s)",
    )
    group.add_argument(
        "--max-pdu",
        type=parse_bytes,
        default=Limits.pdu,
        metavar="SIZE",
        help="the largest PDU to receive, such as 64KiB, or in bytes (default: %(default)s)",
    )
    group.add_argument(
        "--max-object",
        type=parse_bytes,
        default=Limits.size,
        metavar="SIZE",
        help="the largest object to receive, such as 512MiB, or in bytes (default: %(default)s)",
    )
    group.add_argument(
        "--tls-cert",
        type=Path,
        metavar="PEM",
        help="this node's certificate: turns TLS on, and peers need a certificate as well",
    )
    group.add_argument(
        "--tls-key", type=Path, metavar="PEM", help="the private key of the certificate"
    )
    group.add_argument(
        "--tls-ca", type=Path, metavar="PEM", help="the authority that signs peers' certificates"
    )
    group.add_argument(
        "--http-port",
        type=_port,
        metavar="N",
        help="serve /health, /ready and /metrics on this port of the same address",
    )


def _add_sending(group: argparse._ArgumentGroup) -> None:
    """Add the options of the destinations."""
    group.add_argument(
        "--send-to",
        action="append",
        default=[],
        metavar="AET@HOST:PORT",
        help="send to this PACS by C-STORE; tls://AET@HOST:PORT uses TLS; repeatable",
    )
    group.add_argument(
        "--stow",
        action="append",
        default=[],
        metavar="URL",
        help=(
            "send to this DICOMweb service by STOW-RS; credentials come from the environment or"
            " ~/.netrc; repeatable"
        ),
    )


@events_on_standard_error()
def _serve(options: argparse.Namespace) -> int:
    limits, tls = _check(options), _tls(options)
    # A missing package ends the command before the model is opened.
    pynetdicom()
    events = Events()
    with ExitStack() as stack:
        stack.enter_context(ends_when_told(0))
        destinations = _destinations(options, tls)
        models = stack.enter_context(open_models(options))
        _introduce(models, events)
        plans = plans_by_model(options, models, options.spool, resume=True)
        for name, plan in plans.items():
            plan.writer.check(models[name].manifest, options.spool)
        spool = Spool(options.spool, keep=options.keep)
        stack.callback(spool.close)
        if spool.narrowed:
            events.say("spool_narrowed", mode="700")

        def log(action: str, facts: Facts) -> None:
            # The node itself reports a failure.
            if action != "failed":
                events.say(action, **facts)

        audit_file = options.audit or options.spool / AUDIT
        audit = stack.enter_context(AuditTrail(audit_file, "serve", log))
        audit.load(models)

        def synthesize(cases: Sequence[Case], results: Path) -> Iterator[CaseResult]:
            study_plans = {name: replace(plan, output=results) for name, plan in plans.items()}
            for result, model in synthesize_cases(models, cases, study_plans, quiet=True):
                audit.result(result, model, options.seed, study=results.parent.name)
                yield result

        send_queue = SendQueue(spool, destinations, events, audit)
        stack.callback(send_queue.close, END)
        store_scp = StoreSCP(
            spool,
            events,
            options.aet,
            (options.host, options.port),
            tuple(options.allow),
            limits,
            tls,
        )
        stack.callback(store_scp.close)
        node = Node(
            spool,
            send_queue,
            events,
            options.quiet_period,
            lambda folder: find(options, [folder]),
            synthesize,
            audit,
        )
        ports: dict[str, Any] = {"dicom": store_scp.port}
        if options.http_port is not None:
            health_server = HealthServer(
                (options.host, options.http_port),
                events,
                spool,
                lambda: _fault(store_scp, send_queue),
                lambda: _fault(store_scp, send_queue) or spool.full(),
            )
            stack.callback(health_server.close)
            ports["http"] = health_server.port
        try:
            events.say(
                "listening",
                aet=options.aet,
                host=options.host,
                **ports,
                tls="mutual" if tls else "none",
                model=", ".join(synth.manifest.name for synth in models.values()),
                backend=", ".join(synth.backend for synth in models.values()),
            )
            node.run()
        except KeyboardInterrupt:
            events("stopping")
    events("stopped")
    # The interpreter's last garbage collection would walk through all loaded modules, which takes
    # seconds on a busy machine.
    gc.freeze()
    return 0


def _introduce(models: Models, events: Events) -> None:
    """Register the open models with the metrics."""
    for name, synth in models.items():
        file = synth.manifest.files.get(synth.file)
        events.metrics.model(
            name,
            engine=synth.engine,
            manifest_sha256=synth.manifest_sha256,
            model_sha256="" if file is None else file.sha256,
        )


def _fault(store_scp: StoreSCP, send_queue: SendQueue) -> str:
    """Return why the node is not healthy; empty when it is."""
    return store_scp.wrong() or ("" if send_queue.alive else "a thread that sends has ended")


def _check(options: argparse.Namespace) -> Limits:
    """Return the limits; raise `UsageError` for options that do not fit together."""
    for title in (options.aet, *options.allow):
        characters_allowed = title.isascii() and title.isprintable() and "\\" not in title
        if not 0 < len(title.strip()) <= 16 or not characters_allowed:
            raise UsageError(
                f"{title!r} is not an AE title",
                expected="1 to 16 ASCII characters (PS3.5, 6.2)",
                remedy="correct it",
            )
    if not options.allow and not options.allow_any:
        raise UsageError(
            "no calling AE title is allowed",
            expected="--allow AET for each calling AE title",
            remedy="name them, or give --allow-any",
        )
    if options.allow and options.allow_any:
        raise UsageError(
            "--allow and --allow-any exclude each other",
            expected="one of them",
            remedy="leave one out",
        )
    if not (options.send_to or options.stow or options.keep):
        raise UsageError(
            "the results have no destination",
            expected="--send-to AET@HOST:PORT, --stow URL, or --keep",
            remedy="give one of them",
        )
    pdu_in_range = 4096 <= options.max_pdu <= 1 << 24
    if options.max_associations < 1 or not pdu_in_range or options.quiet_period < 0:
        raise UsageError(
            "a limit is out of range",
            expected=(
                "--max-associations from 1, --max-pdu from 4KiB to 16MiB, --quiet-period from 0"
            ),
            remedy="leave it out for the default",
        )
    if not loopback(options.host) and options.tls_cert is None:
        print(
            f"warning: {options.host} can be reached from other machines, and without TLS whoever"
            " listens to the network reads the images",
            file=sys.stderr,
        )
    return Limits(options.max_associations, options.max_pdu, options.max_object)


def _tls(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return the TLS context for peers that connect to this node; None without certificates."""
    files = (options.tls_cert, options.tls_key, options.tls_ca)
    if files == (None, None, None):
        return None
    if None in files:
        raise UsageError(
            "TLS is mutual here",
            expected="--tls-cert, --tls-key and --tls-ca together",
            remedy="give all three",
        )
    return _context(ssl.PROTOCOL_TLS_SERVER, *files)


def _context(protocol: int, cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """Build a TLS context that requires a certificate of `ca` from the peer."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    expected = "a certificate, its private key and a certificate authority in PEM"
    for file in (cert, key, ca):
        # A pipe is refused here: OpenSSL would wait for somebody to write into it.
        with reading(file, expected, UsageError), open_input(file):
            pass
    with reading(cert, expected, UsageError):
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _destinations(options: argparse.Namespace, tls: ssl.SSLContext | None) -> list[Destination]:
    """Return the destinations of `--send-to` and `--stow`."""
    client_tls = None
    if tls is not None:
        files = (options.tls_cert, options.tls_key, options.tls_ca)
        client_tls = _context(ssl.PROTOCOL_TLS_CLIENT, *files)
    web = [DicomWeb(url, client_tls) for url in options.stow]
    if len({service.host for service in web}) > 1 and from_environment():
        raise UsageError(
            "the credentials in the environment would go to several hosts",
            expected="one --stow host",
            remedy=(
                "put the credentials of each host into ~/.netrc, and unset MASK2CT_STOW_TOKEN and"
                " MASK2CT_STOW_USER"
            ),
        )
    archives = [StoreSCU(text, options.aet, client_tls) for text in options.send_to]
    destinations: list[Destination] = [*archives, *web]
    if len({destination.name for destination in destinations}) < len(destinations):
        raise UsageError(
            "a destination is given twice", expected="each once", remedy="leave one out"
        )
    return destinations


def _port(text: str) -> int:
    """Parse a port number."""
    if not text.isdecimal() or int(text) > 65535:
        raise UsageError(f"{text} is not a port", expected="0 to 65535", remedy="correct it")
    return int(text)
