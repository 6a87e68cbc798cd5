"""`mask2ct serve`: a DICOM node that synthesizes what it is sent, and sends it on."""

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
from ..core.console import EXIT_CODES
from ..core.errors import UsageError, reading
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
from .options import (
    add_audit,
    add_engine,
    add_making,
    add_reading,
    find,
    open_models,
    plans_by_model,
    synthesize_cases,
)

LOOPBACK = "127.0.0.1"


def add(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="a DICOM node: masks in by C-STORE, CTs out by C-STORE or STOW-RS",
        epilog=(
            f"{EXIT_CODES}; serve ends with 0 when it is stopped, by Ctrl-C or SIGTERM: what it has"
            " goes on when it is started again"
        ),
    )
    serve.set_defaults(command=_serve, format="dicom")
    add_engine(serve)
    serve.add_argument(
        "--spool",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder for what has arrived and is not yet sent on",
    )
    add_audit(serve, f"{AUDIT} in DIR")
    serve.add_argument(
        "--keep", action="store_true", help="keep what has been sent on, and its masks, in DIR/done"
    )
    serve.add_argument(
        "--quiet-period",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help=(
            "a study is complete when nobody has sent anything of it for so long (default:"
            " %(default)s)"
        ),
    )
    who = serve.add_argument_group("who may send")
    who.add_argument("--aet", default="MASK2CT", help="this node's AE title (default: %(default)s)")
    who.add_argument(
        "--host",
        default=LOOPBACK,
        help="the address to listen on (default: %(default)s, this machine alone)",
    )
    who.add_argument(
        "--port",
        type=_port,
        default=11112,
        help="for DICOM (default: %(default)s; 0: any that is free, see the first lines)",
    )
    who.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="AET",
        help="a calling AE title that is let in; repeatable",
    )
    who.add_argument("--allow-any", action="store_true", help="let every calling AE title in")
    who.add_argument(
        "--max-associations",
        type=int,
        default=Limits.associations,
        metavar="N",
        help="at once (default: %(default)s)",
    )
    who.add_argument(
        "--max-pdu",
        type=parse_bytes,
        default=Limits.pdu,
        metavar="SIZE",
        help="that is received (default: %(default)s)",
    )
    who.add_argument(
        "--max-object",
        type=parse_bytes,
        default=Limits.size,
        metavar="SIZE",
        help="of one object, 512MiB or bytes (default: %(default)s)",
    )
    who.add_argument(
        "--tls-cert",
        type=Path,
        metavar="PEM",
        help="this node's certificate: TLS, and peers must have one, too",
    )
    who.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    who.add_argument(
        "--tls-ca", type=Path, metavar="PEM", help="what signs the peers' certificates"
    )
    who.add_argument(
        "--http-port",
        type=_port,
        metavar="N",
        help="for /health, /ready and /metrics, on the same address",
    )
    to = serve.add_argument_group("where to")
    to.add_argument(
        "--send-to",
        action="append",
        default=[],
        metavar="AET@HOST:PORT",
        help="a PACS, by C-STORE; tls://AET@HOST:PORT with TLS; repeatable",
    )
    to.add_argument(
        "--stow",
        action="append",
        default=[],
        metavar="URL",
        help=(
            "a DICOMweb service, by STOW-RS; credentials from the environment or ~/.netrc;"
            " repeatable"
        ),
    )
    add_making(serve.add_argument_group("results"))
    add_reading(serve)


def _serve(options: argparse.Namespace) -> int:
    limits, tls = _check(options), _tls(options)
    pynetdicom()  # before the model is opened, that it is there
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
            if action != "failed":  # which the node says itself
                events.say(action, **facts)

        audit_file = options.audit or options.spool / AUDIT
        audit = stack.enter_context(AuditTrail(audit_file, "serve", log))
        audit.load(models)

        def synthesize(cases: Sequence[Case], results: Path) -> Iterator[CaseResult]:
            there = {name: replace(plan, output=results) for name, plan in plans.items()}
            for result, model in synthesize_cases(models, cases, there, quiet=True):
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
            watch = HealthServer(
                (options.host, options.http_port),
                events,
                spool,
                lambda: _wrong(store_scp, send_queue),
                lambda: _wrong(store_scp, send_queue) or spool.full(),
            )
            stack.callback(watch.close)
            ports["http"] = watch.port
        events.say(
            "listening",
            aet=options.aet,
            host=options.host,
            **ports,
            tls="mutual" if tls else "none",
            model=", ".join(synth.manifest.name for synth in models.values()),
            backend=", ".join(synth.backend for synth in models.values()),
        )
        try:
            node.run()
        except KeyboardInterrupt:
            events("stopping")
    events("stopped")
    # else the interpreter's last collection walks through all that was loaded: seconds on a busy
    # machine
    gc.freeze()
    return 0


def _introduce(models: Models, events: Events) -> None:
    """Name the open models to whoever reads the metrics."""
    for name, synth in models.items():
        file = synth.manifest.files.get(synth.file)
        events.metrics.model(
            name,
            engine=synth.engine,
            manifest_sha256=synth.manifest_sha256,
            model_sha256="" if file is None else file.sha256,
        )


def _wrong(store_scp: StoreSCP, send_queue: SendQueue) -> str:
    return store_scp.wrong() or ("" if send_queue.alive else "a thread that sends has ended")


def _check(options: argparse.Namespace) -> Limits:
    """Raise `UsageError` for options that do not fit together."""
    for title in (options.aet, *options.allow):
        if (
            not 0 < len(title.strip()) <= 16
            or not title.isascii()
            or not title.isprintable()
            or "\\" in title
        ):
            raise UsageError(
                f"{title!r} is no AE title",
                expected="1 to 16 ASCII characters (PS3.5, 6.2)",
                remedy="correct it",
            )
    if not options.allow and not options.allow_any:
        raise UsageError(
            "nobody may send",
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
            "what is synthesized goes nowhere",
            expected="--send-to AET@HOST:PORT, --stow URL, or --keep",
            remedy="give one",
        )
    if (
        options.max_associations < 1
        or not 4096 <= options.max_pdu <= 1 << 24
        or options.quiet_period < 0
    ):
        raise UsageError(
            "a limit is out of range",
            expected=(
                "--max-associations from 1, --max-pdu from 4KiB to 16MiB, --quiet-period from 0"
            ),
            remedy="leave it out for the default",
        )
    if not loopback(options.host) and options.tls_cert is None:
        print(
            f"warning: {options.host} is more than this machine, and without TLS anyone there reads"
            " what is sent",
            file=sys.stderr,
        )
    return Limits(options.max_associations, options.max_pdu, options.max_object)


def _tls(options: argparse.Namespace) -> ssl.SSLContext | None:
    """The context for peers that connect; its certificates serve `_outward`, too."""
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
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    expected = "a certificate, its private key and a certificate authority in PEM"
    for file in (cert, key, ca):
        with (
            reading(file, expected, UsageError),
            open_input(file),
        ):  # OpenSSL would wait for whoever writes into a pipe
            pass
    with reading(cert, expected, UsageError):
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _destinations(options: argparse.Namespace, tls: ssl.SSLContext | None) -> list[Destination]:
    outward = (
        None
        if tls is None
        else _context(ssl.PROTOCOL_TLS_CLIENT, options.tls_cert, options.tls_key, options.tls_ca)
    )
    web = [DicomWeb(url, outward) for url in options.stow]
    if len({service.host for service in web}) > 1 and from_environment():
        raise UsageError(
            "the credentials in the environment would go to several hosts",
            expected="one --stow host",
            remedy=(
                "give each host's in ~/.netrc, and none in MASK2CT_STOW_TOKEN and MASK2CT_STOW_USER"
            ),
        )
    found: list[Destination] = [
        *(StoreSCU(text, options.aet, outward) for text in options.send_to),
        *web,
    ]
    if len({destination.name for destination in found}) < len(found):
        raise UsageError(
            "a destination is given twice", expected="each once", remedy="leave one out"
        )
    return found


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise UsageError(f"{text} is no port", expected="0 to 65535", remedy="correct it")
    return int(text)
