"""Named label tables: the values of well-known label files and the structures they mean.

A preset may describe the labels that a model is trained on, or (as `--labels NAME`) the values of
masks from other sources. Codes are SNOMED CT. Sources: MM-WHS (Zhuang & Shen, Medical Image
Analysis 31, 2016); TotalSegmentator v1 (104 classes) and v2 (117 classes), `total`, and
`heartchambers_highres` (Wasserthal et al., Radiology: AI 5, 2023); AMOS (Ji et al., NeurIPS 2022).
"""

from __future__ import annotations

from .manifest import Label, LabelTable
from .totalsegmentator import TOTAL_V1, TOTAL_V2

# In the order of the values. The released labels also hold a stray 421 that means 420.
MM_WHS = LabelTable(
    (
        Label("background", 0),
        Label("myocardium", 205, snomed="74281007"),
        Label("left atrium", 420, aliases=(421,), snomed="82471001"),
        Label("left ventricle", 500, snomed="87878005"),
        Label("right atrium", 550, snomed="73829009"),
        Label("right ventricle", 600, snomed="53085002"),
        Label("ascending aorta", 820, snomed="54247002"),
        Label("pulmonary artery", 850, snomed="81040000"),
    )
)
# The same structures numbered 0..7, as in slices prepared for the original system.
MM_WHS_INDICES = LabelTable(
    tuple(Label(x.name, index, snomed=x.snomed) for index, x in enumerate(MM_WHS.labels))
)

TOTALSEGMENTATOR_HEART = LabelTable(
    (
        Label("background", 0),
        Label("heart_myocardium", 1, snomed="74281007"),
        Label("heart_atrium_left", 2, snomed="82471001"),
        Label("heart_ventricle_left", 3, snomed="87878005"),
        Label("heart_atrium_right", 4, snomed="73829009"),
        Label("heart_ventricle_right", 5, snomed="53085002"),
        Label("aorta", 6, snomed="15825003"),
        Label("pulmonary_artery", 7, snomed="81040000"),
    )
)
# The classes in and next to the heart, of 117; CLASSES has all.
TOTALSEGMENTATOR = LabelTable(
    (
        Label("background", 0),
        Label("heart", 51, snomed="80891009"),
        Label("aorta", 52, snomed="15825003"),
        Label("pulmonary_vein", 53, snomed="122972007"),
        Label("brachiocephalic_trunk", 54, snomed="12691009"),
        Label("atrial_appendage_left", 61, snomed="33626005"),
        Label("superior_vena_cava", 62, snomed="48345005"),
        Label("inferior_vena_cava", 63, snomed="64131007"),
    )
)
TOTALSEGMENTATOR_V1 = LabelTable(
    (
        Label("background", 0),
        Label("aorta", 7, snomed="15825003"),
        Label("inferior_vena_cava", 8, snomed="64131007"),
        Label("heart_myocardium", 44, snomed="74281007"),
        Label("heart_atrium_left", 45, snomed="82471001"),
        Label("heart_ventricle_left", 46, snomed="87878005"),
        Label("heart_atrium_right", 47, snomed="73829009"),
        Label("heart_ventricle_right", 48, snomed="53085002"),
        Label("pulmonary_artery", 49, snomed="81040000"),
    )
)
AMOS = LabelTable(
    (
        Label("background", 0),
        Label("spleen", 1, snomed="78961009"),
        Label("right kidney", 2, snomed="9846003"),
        Label("left kidney", 3, snomed="18639004"),
        Label("gall bladder", 4, snomed="28231008"),
        Label("esophagus", 5, snomed="32849002"),
        Label("liver", 6, snomed="10200004"),
        Label("stomach", 7, snomed="69695003"),
        Label("aorta", 8, snomed="15825003"),
        Label("postcava", 9, snomed="64131007"),
        Label("pancreas", 10, snomed="15776009"),
        Label("right adrenal gland", 11, snomed="29392005"),
        Label("left adrenal gland", 12, snomed="38360003"),
        Label("duodenum", 13, snomed="38848004"),
        Label("bladder", 14, snomed="89837001"),
        Label("prostate/uterus", 15),
    )
)
PRESETS: dict[str, LabelTable] = {
    "mm-whs": MM_WHS,
    "mm-whs-indices": MM_WHS_INDICES,
    "totalsegmentator": TOTALSEGMENTATOR,
    "totalsegmentator-v1": TOTALSEGMENTATOR_V1,
    "totalsegmentator-heartchambers": TOTALSEGMENTATOR_HEART,
    "amos": AMOS,
}
# Value → name of every class in a file of the preset, where the table has only some of them.
CLASSES: dict[str, dict[int, str]] = {"totalsegmentator": TOTAL_V2, "totalsegmentator-v1": TOTAL_V1}
# A structure that a model lacks → the part of it that the model may have instead: MM-WHS labels
# only the ascending part of the aorta.
STANDS_FOR: dict[str, str] = {"15825003": "54247002"}


def class_names(preset: str) -> dict[int, str]:
    """Every class that a file of the preset may hold, the background among them.

    Args:
        preset: The preset's name.

    Returns:
        Value → name.
    """
    return {
        **CLASSES.get(preset, {}),
        **{label.value: label.name for label in PRESETS[preset].labels},
    }
