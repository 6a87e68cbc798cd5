"""The verdict of a training decides whether its model is exported."""

from __future__ import annotations

from train.checkpoint import TrainedRun
from train.verdict import BROKEN, WEAK, BrokenModel, WeakModel


def check_verdict(run: TrainedRun, *, accept_weak: bool = False) -> None:
    """Refuse a broken training, and a weak one that nobody accepted.

    A run without a verdict, of an earlier version, and one that was too short to be assessed are
    exported: the model card says so.

    Args:
        run: The run.
        accept_weak: Whether the user accepts the weaknesses.

    Raises:
        BrokenModel: The verdict is "broken".
        WeakModel: The verdict is "weak", and `accept_weak` is false.
    """
    verdict = run.data.get("verdict") or {}
    texts = "; ".join(finding["text"] for finding in verdict.get("findings", []))
    if verdict.get("verdict") == BROKEN:
        raise BrokenModel(
            f"the training is broken and is not exported: {texts}",
            expected="a training within the limits of docs/reference/quality.md",
            remedy="train again: longer, on more patients, or with a lower optimizer.lr_g",
            file=run.folder,
        )
    if verdict.get("verdict") == WEAK and not accept_weak:
        raise WeakModel(
            f"the training is weak: {texts}",
            expected="a training within the limits of docs/reference/quality.md",
            remedy="train longer or on more patients, or add --accept-weak; the model card keeps"
            " these sentences",
            file=run.folder,
        )
