"""The classes of TotalSegmentator's task `total` by value, of versions 1 and 2.

Source: Wasserthal et al., Radiology: AI 5, 2023. TotalSegmentator gives the file of each class the
same name.
"""

from __future__ import annotations


def _spine(*segments: str) -> list[str]:
    """Vertebrae from below upwards; "L5-1" stands for L5 to L1."""
    names = []
    for segment in segments:
        first, _, last = segment[1:].partition("-")
        names += [
            f"vertebrae_{segment[0]}{n}" for n in range(int(first), int(last or first) - 1, -1)
        ]
    return names


def _pairs(*names: str, sides: tuple[str, str] = ("left", "right")) -> list[str]:
    """The classes of both sides of each structure."""
    return [f"{name}_{side}" for name in names for side in sides]


_RIBS = [f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13)]
_KIDNEYS = ["spleen", *_pairs("kidney", sides=("right", "left")), "gallbladder", "liver", "stomach"]
_ADRENAL = _pairs("adrenal_gland", sides=("right", "left"))
_LUNG = [
    "lung_upper_lobe_left",
    "lung_lower_lobe_left",
    "lung_upper_lobe_right",
    "lung_middle_lobe_right",
    "lung_lower_lobe_right",
]
_LIMBS = _pairs("humerus", "scapula", "clavicula", "femur", "hip")
_MUSCLES = _pairs("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas")
_ILIAC = _pairs("iliac_artery", "iliac_vena")
_CHAMBERS = [
    "heart_myocardium",
    "heart_atrium_left",
    "heart_ventricle_left",
    "heart_atrium_right",
    "heart_ventricle_right",
]

_V1 = [
    *_KIDNEYS,
    "aorta",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    "pancreas",
    *_ADRENAL,
    *_LUNG,
    *_spine("L5-1", "T12-1", "C7-1"),
    "esophagus",
    "trachea",
    *_CHAMBERS,
    "pulmonary_artery",
    "brain",
    *_ILIAC,
    "small_bowel",
    "duodenum",
    "colon",
    *_RIBS,
    *_LIMBS,
    "sacrum",
    "face",
    *_MUSCLES,
    "urinary_bladder",
]
_V2 = [
    *_KIDNEYS,
    "pancreas",
    *_ADRENAL,
    *_LUNG,
    "esophagus",
    "trachea",
    "thyroid_gland",
    "small_bowel",
    "duodenum",
    "colon",
    "urinary_bladder",
    "prostate",
    *_pairs("kidney_cyst"),
    "sacrum",
    *_spine("S1", "L5-1", "T12-1", "C7-1"),
    "heart",
    "aorta",
    "pulmonary_vein",
    "brachiocephalic_trunk",
    *_pairs("subclavian_artery", "common_carotid_artery", sides=("right", "left")),
    *_pairs("brachiocephalic_vein"),
    "atrial_appendage_left",
    "superior_vena_cava",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    *_ILIAC,
    *_LIMBS,
    "spinal_cord",
    *_MUSCLES,
    "brain",
    "skull",
    *_RIBS,
    "sternum",
    "costal_cartilages",
]

TOTAL_V1 = dict(enumerate(_V1, 1))
TOTAL_V2 = dict(enumerate(_V2, 1))
# Files of these names, all binary, are the classes of one mask.
CLASS_NAMES = frozenset({*_V1, *_V2})
