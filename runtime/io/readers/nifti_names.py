"""Names of label values in a NIfTI: a Caret label table in an extension behind the header.

See "extensions" in nifti1.h. TotalSegmentator and Connectome Workbench write it as

    <CaretExtension><VolumeInformation><LabelTable>
    <Label Key="44"><![CDATA[heart_myocardium]]></Label>…
"""

from __future__ import annotations

import re
import struct
from contextlib import nullcontext
from html import unescape
from pathlib import Path

from ...core.atomic_files import open_input
from ...core.errors import reading
from ...core.volume import Segment
from .volume_header import EXPECTED
from .voxels import unpacked

# Bytes of all extensions; more is not a label table.
MAX_BYTES = 4 << 20
_START, _END = "<LabelTable", "</LabelTable>"
# Every repetition is bounded, so that the time is linear in the length of any text.
_LABEL = re.compile(
    r"<Label\b[^<>]{0,200}?\bKey\s{0,9}=\s{0,9}[\"'](\d{1,10})[\"'][^<>]{0,200}>\s{0,99}"
    r"(?:<!\[CDATA\[([^\]<>]{0,256})\]\]>|([^<>]{0,256}))\s{0,99}</Label>"
)


def embedded_names(path: Path) -> tuple[Segment, ...]:
    """The names that a NIfTI holds for its values, by value; empty if it holds none.

    Only positive values count: 0 is background, whatever its name ("???").

    Args:
        path: A file whose header `check_header` has passed.
    """
    packed = path.name.lower().endswith(".gz")
    with (
        reading(path, EXPECTED),
        open_input(path) as handle,
        unpacked(path, handle) if packed else nullcontext(handle) as content,
    ):
        head = content.read(352)
        order = next((o for o in "<>" if struct.unpack_from(o + "i", head)[0] in (348, 540)), "<")
        if struct.unpack_from(order + "i", head)[0] == 540:
            head += content.read(544 - 352)
            (offset,) = struct.unpack_from(order + "q", head, 168)
        else:
            offset = int(struct.unpack_from(order + "f", head, 108)[0])
        if len(head) < 352 or head[-4] == 0 or not len(head) + 8 <= offset <= MAX_BYTES:
            return ()
        text = content.read(offset - len(head)).decode("utf-8", "replace")
    start = text.find(_START)
    end = text.find(_END, start) if start >= 0 else -1
    names = {
        int(m[1]): (m[2] if m[2] is not None else unescape(m[3])).strip()
        for m in _LABEL.finditer(text, max(0, start), max(0, end))
    }
    return tuple(
        Segment(value, name, strict=True) for value, name in sorted(names.items()) if value and name
    )
