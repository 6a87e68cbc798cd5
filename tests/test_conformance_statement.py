"""docs/reference/dicom-conformance.md against the code: what is accepted, proposed, sent and written, and
the senders' commands.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from nodes import QUIETLY, Serving, associate, push, settled, until, write_study
from pydicom import Dataset
from pydicom.datadict import keyword_for_tag
from pydicom.uid import RTStructureSetStorage
from pynetdicom import AE, evt
from samples import elsewhere
from series import SOURCE, write_series
from test_dicom_conformance import tool

from runtime.cli import serve
from runtime.core.manifest import Label, LabelTable
from runtime.core.volume import DicomSource
from runtime.engines.fake import fake_manifest
from runtime.service.dicom_receiver import _support, pynetdicom
from runtime.service.dicom_server import Limits
from runtime.service.store_scu import AGREE, ANSWER, CONNECT

OWN_LABELS = replace(
    fake_manifest(LabelTable(tuple(Label(f"own {n}", n) for n in range(8)))), name="own"
)
RTSTRUCT: DicomSource = replace(SOURCE, sop_class_uid=RTStructureSetStorage)
OBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CT Image": ("0001.dcm", {}),
    "Enhanced CT Image": ("ct.dcm", {"enhanced": True}),
    "Segmentation": ("seg.dcm", {"segmentation": "binary"}),
    "Label Map Segmentation": ("seg.dcm", {"segmentation": "labelmap"}),
}
Row = dict[str, str]


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "reference" / "dicom-conformance.md").read_text()


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    """The cells of a table below a heading, without its head."""
    section = re.split(r"(?m)^#+ ", page.split(f" {heading}\n", 1)[1])[0]
    tables = re.findall(r"(?m)(?:^\|.*\n)+", section)
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        for row in tables[number].splitlines()[2:]
    ]


def elements(ds: Dataset, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each element of a data set and of its items, by keywords from above; of a sequence the
    number of items.
    """
    for element in ds:
        path = (*above, element.keyword)
        yield path, len(element.value) if element.VR == "SQ" else element.value
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item, path)


def values(ds: Dataset) -> dict[tuple[str, ...], list[Any]]:
    found: dict[tuple[str, ...], list[Any]] = {}
    for path, value in elements(ds):
        found.setdefault(path, []).append(value)
    return found


def documented(page: str, name: str) -> dict[tuple[str, ...], Row]:
    rows: dict[tuple[str, ...], Row] = {}
    path: list[str] = []
    for _, attribute, tag, presence, source, value in table(page, name):
        depth, keyword = attribute.count("> "), attribute.split()[-1]
        path = [*path[:depth], keyword]
        number = int(tag[1:5] + tag[6:10], 16)
        assert (
            keyword_for_tag(number) or keyword
        ) == keyword  # Synthetic Data is younger than some dictionaries
        assert tuple(path) not in rows
        rows[tuple(path)] = {"presence": presence, "source": source, "value": value}
    return rows


@pytest.mark.parametrize("name", OBJECTS)
def test_each_attribute_written_is_documented(name: str, page: str, tmp_path: Path) -> None:
    file, options = OBJECTS[name]
    rows = documented(page, name)
    kinds: dict[str, dict[str, Any]] = {
        "detached": {},
        "another variant": {"variant": 2, "seed": 5},
        "other labels": {"manifest": OWN_LABELS},
        "attached": {"source": SOURCE, "attach": True},
        "attached to an RTSTRUCT": {"source": RTSTRUCT, "attach": True},
    }
    if file == "seg.dcm":
        kinds["of an Enhanced CT"] = {"enhanced": True}
    written = {
        kind: values(
            pydicom.dcmread(write_series(tmp_path / kind, **{**options, **extra}).folder / file)
        )
        for kind, extra in kinds.items()
    }
    assert set().union(*written.values()) == {
        *rows
    }  # nothing else is written, and all of it at times
    for path, row in rows.items():
        inside = [found[path] for found in written.values() if path in found]
        if row["presence"] != "ANAP":
            assert len(inside) == len(written), f"{path} is not in every object"
        if row["presence"] == "ALWAYS" and path[-1] != "PixelData":
            assert all(value not in (None, "") for each in inside for value in each), (
                f"{path} is empty at times"
            )
        detached = [
            written[kind][path]
            for kind in written
            if "attached" not in kind and path in written[kind]
        ]
        detached.append(written["detached"].get(path, detached[0] if detached else []))
        if row["source"].startswith("EMPTY"):
            assert not any(value for each in detached for value in each), f"{path} holds a value"
        if row["source"].startswith("FIXED") and path[0] not in (
            "SourceImageSequence",
            "SourceInstanceSequence",
        ):
            assert all(
                sorted(set(map(str, each))) == sorted(set(map(str, detached[0])))
                for each in detached
            ), path
            if row["value"]:
                text = str(detached[0][0])
                shown = (
                    "\\".join(detached[0][0]) if path[-1] in ("ImageType", "FrameType") else text
                )
                assert row["value"] == shown, path
        if (
            row["source"].endswith("COPIED with --attach")
            and len(path) == 1
            and path[0] in SOURCE.attributes
        ):
            assert written["attached"][path] == [SOURCE.attributes[path[0]]], path


def test_the_source_names_nothing_when_detached(tmp_path: Path) -> None:
    """What is documented as FIXED or GENERATED is so of a mask that has a patient, too."""
    for file in write_series(tmp_path, source=SOURCE, segmentation="binary").folder.iterdir():
        assert not [
            value
            for value in SOURCE.attributes.values()
            if len(value) > 2 and value.encode() in file.read_bytes()
        ]


def test_documented_contexts_match_code(page: str) -> None:
    from pydicom.uid import UID

    entity = pynetdicom().AE()
    _support(entity)
    accepted = {
        context.abstract_syntax: {*context.transfer_syntax} for context in entity.supported_contexts
    }
    groups = {
        name: set(text.split(", "))
        for name, text in table(page, "2.2 Accepted presentation contexts", 1)
    }
    rows = table(page, "2.2 Accepted presentation contexts")
    assert {uid for _, uid, _ in rows} == {*accepted}
    for name, uid, syntaxes in rows[1:]:
        assert UID(uid).name in (name, uid)  # dictionaries before 2024 lack Label Map Segmentation
        assert set().union(*(groups[group] for group in syntaxes.split(", "))) == accepted[uid]
    assert (
        len(accepted["1.2.840.10008.1.1"]) == len(rows[0][2].split("VR")) + 1
    )  # four, by their names


def test_documented_figures_match_code(page: str) -> None:
    import pynetdicom as library
    from pydicom.uid import PYDICOM_IMPLEMENTATION_UID

    figures = dict(table(page, "2.1 Association policies"))
    if library.__version__ in figures["Implementation Class UID, in associations"]:
        assert figures["Implementation Class UID, in associations"].startswith(
            library.PYNETDICOM_IMPLEMENTATION_UID
        )
        assert (
            figures["Implementation Version Name, in associations"]
            == library.PYNETDICOM_IMPLEMENTATION_VERSION
        )
    assert figures["Implementation Class UID, in files"].split()[0] == PYDICOM_IMPLEMENTATION_UID
    limits = Limits()
    assert (
        figures["time to ask for an association, TLS handshake included"]
        == f"{limits.request_seconds:g} s in all"
    )
    assert figures["connections that have not asked yet"] == str(limits.pending)
    assert figures["time for one PDU of an association"] == f"{limits.pdu_seconds:g} s"
    assert figures["idle association"] == f"ended after {limits.idle_seconds:g} s"
    assert (
        figures["as SCU: connection, association, answer to one object"]
        == f"{CONNECT:g} s, {AGREE:g} s, {ANSWER:g} s"
    )
    assert figures["maximum PDU length as SCU"] == f"{library.AE().maximum_pdu_size} bytes"
    parser = argparse.ArgumentParser()
    serve.add(parser.add_subparsers())
    options = vars(parser.parse_args(["serve", "--model", "m", "--spool", "s"]))
    stated = table(page, "2.5 Configuration")
    assert len(stated) == 8
    for _, default, option in stated:
        value = options[option.strip("`-").replace("-", "_")]
        assert default.split()[0] == (
            f"{value:g}" if isinstance(value, float) else str(value) if value else "none:"
        )
    assert figures["maximum PDU length accepted"].startswith(f"{options['max_pdu']} ")
    assert figures["associations accepted at once"].startswith(f"{options['max_associations']} ")


class TestOnTheWire:
    pytestmark = QUIETLY

    def test_node_negotiates_as_documented(
        self, page: str, fake_model: Path, tmp_path: Path
    ) -> None:
        """What it tells of itself when it accepts and when it proposes, and which contexts it
        proposes.
        """
        figures = dict(table(page, "2.1 Association policies"))
        listed = {uid for _, uid, _ in table(page, "2.3 Proposed presentation contexts")}
        asked: list[Any] = []
        archive = AE(ae_title="PACS")
        for uid in listed:
            archive.add_supported_context(uid)
        handlers = [
            (evt.EVT_ACCEPTED, lambda event: asked.append(event.assoc.requestor)),
            (evt.EVT_C_STORE, lambda event: 0),
        ]
        server = archive.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        assert server is not None
        try:
            port = server.server_address[1]
            with Serving(
                fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}"
            ) as node:
                association = associate(node.port, ["1.2.840.10008.1.1"])
                assert association.is_established
                accepting = association.acceptor
                association.release()
                assert push(node.port, write_study(tmp_path / "given")) == [0]
                settled(node)
        finally:
            server.shutdown()
        assert figures["maximum PDU length accepted"].startswith(f"{accepting.maximum_length} ")
        assert figures["maximum PDU length as SCU"].startswith(f"{asked[0].maximum_length} ")
        for side in (accepting, asked[0]):
            assert (
                figures["Implementation Class UID, in associations"].split()[0]
                == side.implementation_class_uid
            )
            assert (
                figures["Implementation Version Name, in associations"]
                == side.implementation_version_name
            )
        contexts = [
            (str(context.abstract_syntax), *map(str, context.transfer_syntax))
            for context in asked[0].requested_contexts
        ]
        assert {*contexts} == {
            (uid, syntax)
            for uid in ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.66.4")
            for syntax in ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
        }
        assert (
            {uid for uid, _ in contexts} <= listed
            and not asked[0].user_identity
            and not asked[0].role_selection
        )

    @pytest.mark.slow
    def test_each_senders_command_works(self, page: str, fake_model: Path, tmp_path: Path) -> None:
        """As the page has it, but for port and folder; and without -R storescu does stop as it
        says.
        """
        (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        folder = tmp_path / "given"
        write_study(folder)
        with Serving(fake_model, tmp_path / "spool", "--keep", allow="PLANNING", quiet=30) as node:
            for line in block.splitlines():
                tool(shlex.split(line)[0])
                words = shlex.split(
                    line.replace("11112", str(node.port)).replace("DIR", str(folder))
                )
                words[0] = elsewhere(words[0]) or words[0]
                done = subprocess.run(
                    words, capture_output=True, text=True, check=False, timeout=60
                )
                assert (done.returncode, done.stderr) == (0, ""), line
            until(lambda: node.count("stored") == 2 and node.count("echo") == 1, "both have sent")
            words.remove("-R")
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode != 0 and "No presentation context for: (SG)" in done.stderr
