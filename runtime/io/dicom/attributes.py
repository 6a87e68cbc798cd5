"""The attributes that all DICOM objects of mask2ct have: patient, study, marks, origin (PS3.3).

By default an object is detached: it has a patient, a study and a frame of reference of its own, and
copies nothing from the source. UIDs are name-based UUIDs (PS3.5 B.2) of the image's inputs, so that
a second run writes the same objects again. No attribute depends on the clock.
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
from ..marks import PROGRAM, mark_text, notice
from ..writers.base import OutputRecord

if TYPE_CHECKING:
    from pydicom import Dataset

# the date of every run, where the standard or a DICOMDIR requires one
FIXED_DATE, FIXED_TIME = "20000101", "000000"
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
    """The patient, the study and the UIDs of a result.

    Attributes:
        key: the SHA-256 of the image's inputs, in hexadecimal; all UIDs follow from it.
        study_uid: the Study Instance UID.
        frame_of_reference_uid: the Frame of Reference UID.
        study: the attributes of patient and study, by keyword.
        attached: whether the result joins the patient and the study of its mask.
    """

    key: str
    study_uid: str
    frame_of_reference_uid: str
    study: Mapping[str, str]
    attached: bool

    @classmethod
    def of(cls, record: OutputRecord, attach: bool, *, one_patient: bool = False) -> Identity:
        """Derive the identity of a result from its inputs.

        The same model file, backend, mask, seed and variant give the same identity. A result
        without variants has that of variant 0.

        Args:
            record: the result.
            attach: whether it joins the patient and the study of its mask.
            one_patient: whether the results of one mask, seed and model share a patient and a
                study. Each keeps its own frame of reference: deformed variants do not coincide.

        Returns:
            The identity.
        """
        source = record.mask.dicom if attach else None
        inputs = [
            _engine_sha256(record),
            _backend(record),
            record.mask.digest.hex(),
            str(record.seed),
            str(record.variant or 0),
        ]
        derived = record.manifest.derived
        if record.image_sha256:
            inputs.append(record.image_sha256)
        if source is None:
            key = hashlib.sha256("/".join(["mask2ct", *inputs]).encode()).hexdigest()
            kind, prefix = ("DERIVED", "DERIV") if derived else ("SYNTHETIC", "SYNTH")
            patient = key
            if one_patient:
                # not the variant's own mask, which is deformed
                shared = ["mask2ct", *inputs[:2], record.mask_sha256, str(record.seed)]
                patient = hashlib.sha256("/".join(shared).encode()).hexdigest()
            name = f"{prefix}-{patient[:16].upper()}"
            study = {
                "PatientName": f"{name}^",
                "PatientID": name,
                "StudyID": kind,
                "StudyDescription": mark_text(derived=derived),
                "StudyDate": FIXED_DATE,
                "StudyTime": FIXED_TIME,
            }
            return cls(key, uid(patient, "study"), uid(key, "frame of reference"), study, False)
        study_uid = source.attributes["StudyInstanceUID"]
        inputs += [study_uid, *source.sop_instance_uids]
        key = hashlib.sha256("/".join(["mask2ct", *inputs]).encode()).hexdigest()
        study = {name: source.attributes[name] for name in STUDY if name in source.attributes}
        return cls(key, study_uid, source.frame_of_reference_uid, study, True)

    def uid(self, *what: object) -> str:
        """Return the UID of a part of this result; `what` names the part."""
        return uid(self.key, *what)


def uid(*parts: object) -> str:
    """Return a UID from a name-based UUID of `parts` (PS3.5 B.2, RFC 4122 4.3)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(str(p) for p in parts)).int}"


def check_attachable(mask: LabelVolume) -> None:
    """Check that a series can join the patient and the study of a mask.

    Args:
        mask: the mask.

    Raises:
        InputError: the mask is not a DICOM object, or has no Study Instance UID.
        GeometryError: the mask has no frame of reference.
    """
    source = mask.dicom
    if source is None:
        raise InputError(
            "the mask is not a DICOM object, so a series cannot be attached to it",
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
    """Set the attributes that all objects of one result share.

    These are the patient, the study, the marks of a synthetic or derived image, and its origin. A
    derived image does not state Synthetic Data, because its voxels were acquired and then moved. It
    does not state that the patient's identity was removed either, because the anatomy is a
    patient's.

    Args:
        ds: the object, which is changed.
        record: the result.
        identity: its identity.
        of: the relation of the object to the CT ("MASK OF A "), for the Series Description; empty
            for the CT itself.
    """
    from pydicom import DataElement
    from pydicom.config import IGNORE
    from pydicom.datadict import dictionary_VR

    ds.SpecificCharacterSet = "ISO_IR 192"
    derived = record.manifest.derived
    if not derived:
        ds.add_new(SYNTHETIC_DATA, "CS", "YES")
    for keyword in STUDY:
        # all but Study Description are of type 2: present, if empty
        if keyword in identity.study or keyword != "StudyDescription":
            # without validation: a source's value stays as it is, and no warning quotes it
            value = identity.study.get(keyword, "")
            ds.add(DataElement(keyword, dictionary_VR(keyword), value, validation_mode=IGNORE))
    ds.StudyInstanceUID = identity.study_uid
    ds.FrameOfReferenceUID = identity.frame_of_reference_uid
    ds.PositionReferenceIndicator = ""
    if not identity.attached and not derived:
        ds.PatientIdentityRemoved = "YES"
        ds.DeidentificationMethod = (
            "Synthetic: an invented patient, no attribute of a source copied"
        )
    ds.Manufacturer = PROGRAM
    ds.ManufacturerModelName = text(record.manifest.name)
    ds.SoftwareVersions = VERSION
    which = f", VARIANT {record.variant}" if record.variant else ""
    ds.SeriesDescription = of + mark_text(derived=derived) + which
    ds.ProtocolName = mark_text(derived=derived)
    ds.ImageComments = notice(derived=derived)
    ds.DerivationDescription = derivation(record)
    ds.ContributingEquipmentSequence = [_equipment(record)]


def derivation(record: OutputRecord) -> str:
    """Return the Derivation Description of a result: model, engine file, seed, mask or CT."""
    if record.manifest.derived:
        return (
            f"Real CT deformed with its label mask by mask2ct {VERSION}, without a model:"
            f" {record.backend}, seed {record.seed}, variant {record.variant or 0}, CT sha256"
            f" {record.image_sha256}, mask sha256 {record.mask.digest.hex()}"
        )
    return (
        f"Synthetic CT generated by mask2ct {VERSION} from a label mask: model"
        f" {record.manifest.name}, engine file {record.file or 'none'} sha256"
        f" {_engine_sha256(record)}, backend {_backend(record)}, seed {record.seed}, variant"
        f" {record.variant or 0}, mask sha256 {record.mask.digest.hex()}"
        + (f", layout of the CT sha256 {record.image_sha256}" if record.image_sha256 else "")
    )[:1024]


def text(value: str, default: str = "unnamed") -> str:
    """Convert a text to a value of VR LO (PS3.5 6.2).

    Args:
        value: any text.
        default: the result where nothing remains.

    Returns:
        At most 64 bytes in UTF-8 (the standard counts characters), without control characters and
        without the backslash, which separates values.
    """
    plain = "".join(c if c.isprintable() and c != "\\" else " " for c in value)
    return plain.encode()[:64].decode(errors="ignore").strip() or default


def code(value: str, scheme: str, meaning: str) -> Any:
    """Return one item of a code sequence (PS3.3 8.8).

    Args:
        value: the Code Value.
        scheme: the Coding Scheme Designator.
        meaning: the Code Meaning.
    """
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def require_libraries(*names: str) -> None:
    """Check that packages can be imported.

    Args:
        names: the packages.

    Raises:
        MissingComponent: a package cannot be imported.
    """
    import importlib

    for name in names:
        with importing(name, f"{name}, which writes DICOM", 'pip install "mask2ct[dicom]"'):
            importlib.import_module(name)


def _engine_sha256(record: OutputRecord) -> str:
    """The digest of the model file that the engine ran; "none" for the fake engine."""
    return record.manifest.files[record.file].sha256 if record.file else "none"


def _backend(record: OutputRecord) -> str:
    """The backend without version and threads, so that another machine writes the same objects."""
    return record.backend.split(None, 1)[0]


def _equipment(record: OutputRecord) -> Any:
    """The item of the Contributing Equipment Sequence."""
    from pydicom import Dataset

    item = Dataset()
    item.Manufacturer, item.SoftwareVersions = PROGRAM, VERSION
    item.ManufacturerModelName = text(record.manifest.name)
    if record.manifest.derived:
        item.ContributionDescription = "deformed this image with its label mask"
        item.PurposeOfReferenceCodeSequence = [code("109103", "DCM", "Modifying Equipment")]
    else:
        item.ContributionDescription = "generated this image from a label mask"
        item.PurposeOfReferenceCodeSequence = [code("109100", "DCM", "Synthesizing Equipment")]
    return item
