"""What every DICOM object written says of itself: synthetic, by what, from what, for whom.

Attributes by DICOM PS3.3.

Detached by default: a patient, study and frame of reference of its own, nothing of the source. UIDs
are name-based UUIDs (PS3.5 B.2) of what made the image, so that a second run writes the same
objects and not new ones; no clock is read.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import GeometryError, InputError, importing
from ...core.version import VERSION
from ...core.volume import LabelVolume
from ..volume_files import MARKS, mark, notice
from ..writers.base import OutputRecord

if TYPE_CHECKING:
    from pydicom import Dataset

FIXED_DATE, FIXED_TIME = (
    "20000101",
    "000000",
)  # where the standard or a DICOMDIR asks for a date: the same one in every run
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
SYNTHETIC_DATA = 0x0008001C  # by tag: dictionaries before pydicom 3.0 lack it
_NAMESPACE = uuid.UUID("6f6d3c1e-5f0e-5b0a-9c52-0d1f2b7a9e11")
STUDY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDescription",
)


@dataclass(frozen=True)
class Identity:
    """Whom a result belongs to.

    `key`: what made it, as 64 hexadecimal digits; every UID follows from it.
    """

    key: str
    study_uid: str
    frame_of_reference_uid: str
    study: Mapping[str, str]  # attributes of patient and study by keyword
    attached: bool

    @classmethod
    def of(cls, record: OutputRecord, attach: bool) -> Identity:
        """The same model file, kind of engine, mask, seed and variant give the same identity;
        variant 0 is what is synthesized when none is asked for.
        """
        source = record.mask.dicom if attach else None
        made = [
            _engine_sha256(record),
            _backend(record),
            record.mask.digest.hex(),
            str(record.seed),
            str(record.variant or 0),
        ]
        derived = record.manifest.derived
        if derived:
            made.append(record.image_sha256)
        if source is None:
            key = hashlib.sha256("/".join(["mask2ct", *made]).encode()).hexdigest()
            kind, prefix = ("DERIVED", "DERIV") if derived else ("SYNTHETIC", "SYNTH")
            name = f"{prefix}-{key[:16].upper()}"
            study = {
                "PatientName": f"{name}^",
                "PatientID": name,
                "StudyID": kind,
                "StudyDescription": mark(derived=derived),
                "StudyDate": FIXED_DATE,
                "StudyTime": FIXED_TIME,
            }
            return cls(key, uid(key, "study"), uid(key, "frame of reference"), study, False)
        study_uid = source.attributes["StudyInstanceUID"]
        key = hashlib.sha256(
            "/".join(["mask2ct", *made, study_uid, *source.sop_instance_uids]).encode()
        ).hexdigest()
        study = {name: source.attributes[name] for name in STUDY if name in source.attributes}
        return cls(key, study_uid, source.frame_of_reference_uid, study, True)

    def uid(self, *what: object) -> str:
        """The UID of a part of this result."""
        return uid(self.key, *what)


def uid(*parts: object) -> str:
    """2.25 and the decimal form of a name-based UUID (DICOM PS3.5 B.2, RFC 4122 4.3) of `parts`."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(str(p) for p in parts)).int}"


def check_attachable(mask: LabelVolume) -> None:
    """Refuse a mask to which no series can be attached."""
    source = mask.dicom
    if source is None:
        raise InputError(
            "the mask is no DICOM object: there is nothing to attach a series to",
            expected="a DICOM mask",
            remedy="leave --attach out",
        )
    if not source.frame_of_reference_uid:
        raise GeometryError(
            "the mask has no frame of reference",
            expected="a Frame of Reference UID to attach the series to",
            remedy="leave --attach out",
        )
    if not source.attributes.get("StudyInstanceUID"):
        raise InputError(
            "the mask has no Study Instance UID",
            expected="the study to attach the series to",
            remedy="leave --attach out",
        )


def describe(ds: Dataset, record: OutputRecord, identity: Identity, *, of: str = "") -> None:
    """Set on `ds` what is the same for every object of one result: patient, study, the marks of a
    synthetic or derived image, its making.

    A derived one states neither Synthetic Data (its voxels were acquired, and moved) nor that its
    patient's identity was removed: the anatomy is a patient's. `of`: what the object is of the CT;
    empty for the CT itself.
    """
    from pydicom import DataElement
    from pydicom.config import IGNORE
    from pydicom.datadict import dictionary_VR

    ds.SpecificCharacterSet = "ISO_IR 192"
    derived = record.manifest.derived
    if not derived:
        ds.add_new(SYNTHETIC_DATA, "CS", "YES")
    for keyword in STUDY:
        if (
            keyword in identity.study or keyword != "StudyDescription"
        ):  # the others are of type 2: present, if empty
            value = identity.study.get(
                keyword, ""
            )  # a source's own value stays as it is, valid or not, and unquoted on the screen
            ds.add(DataElement(keyword, dictionary_VR(keyword), value, validation_mode=IGNORE))
    ds.StudyInstanceUID = identity.study_uid
    ds.FrameOfReferenceUID = identity.frame_of_reference_uid
    ds.PositionReferenceIndicator = ""
    if not identity.attached and not derived:
        ds.PatientIdentityRemoved = "YES"
        ds.DeidentificationMethod = (
            "Synthetic: an invented patient, no attribute of a source copied"
        )
    ds.Manufacturer = MARKS[1]
    ds.ManufacturerModelName = text(record.manifest.name)
    ds.SoftwareVersions = VERSION
    ds.SeriesDescription = of + mark(derived=derived)
    ds.ProtocolName = mark(derived=derived)
    ds.ImageComments = notice(derived=derived)
    ds.DerivationDescription = derivation(record)
    ds.ContributingEquipmentSequence = [_equipment(record)]


def derivation(record: OutputRecord) -> str:
    """What made the image, in words: model, engine file, seed, mask; or the CT that was
    deformed.
    """
    if record.manifest.derived:
        return (
            f"Real CT deformed with its label mask by mask2ct {VERSION}, without a model:"
            f" {record.backend}, seed {record.seed}, variant {record.variant or 0}, CT sha256"
            f" {record.image_sha256}, mask sha256 {record.mask.digest.hex()}"
        )
    return (
        f"Synthetic CT synthesized by mask2ct {VERSION} from a label mask: model"
        f" {record.manifest.name}, engine file {record.file or 'none'} sha256"
        f" {_engine_sha256(record)}, backend {_backend(record)}, seed {record.seed}, variant"
        f" {record.variant or 0}, mask sha256 {record.mask.digest.hex()}"
    )[:1024]


def text(value: str, default: str = "unnamed") -> str:
    """`value` as LO (PS3.5 6.2) takes it: 64 bytes (the standard says characters), no backslash,
    which separates values, no controls.
    """
    plain = "".join(c if c.isprintable() and c != "\\" else " " for c in value)
    return plain.encode()[:64].decode(errors="ignore").strip() or default


def code(value: str, scheme: str, meaning: str) -> Any:
    """One item of a code sequence (PS3.3 8.8)."""
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def require_libraries(*names: str) -> None:
    """Raise `MissingComponent` unless the packages can be imported."""
    import importlib

    for name in names:
        with importing(name, f"{name}, which writes DICOM", 'pip install "mask2ct[dicom]"'):
            importlib.import_module(name)


def _engine_sha256(record: OutputRecord) -> str:
    return record.manifest.files[record.file].sha256 if record.file else "none"


def _backend(record: OutputRecord) -> str:
    """Which kind of engine, without its version or threads: another machine writes the same
    objects.
    """
    return record.backend.split(None, 1)[0]


def _equipment(record: OutputRecord) -> Any:
    from pydicom import Dataset

    item = Dataset()
    item.Manufacturer, item.ManufacturerModelName, item.SoftwareVersions = (
        MARKS[1],
        text(record.manifest.name),
        VERSION,
    )
    if record.manifest.derived:
        item.ContributionDescription = "deformed this image with its label mask"
        item.PurposeOfReferenceCodeSequence = [code("109103", "DCM", "Modifying Equipment")]
    else:
        item.ContributionDescription = "synthesized this image from a label mask"
        item.PurposeOfReferenceCodeSequence = [code("109100", "DCM", "Synthesizing Equipment")]
    return item
