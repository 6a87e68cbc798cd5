"""`mask2ct serve`: what is acknowledged is never lost, what is painted is what `synth` paints, strangers and damage are refused by name."""

from __future__ import annotations

from pathlib import Path

from nodes import Serving, archive, associate, push, read_all, until, write_study
from samples import synth


def test_a_segmentation_becomes_a_series_in_the_archive(fake_model: Path, tmp_path: Path) -> None:
    mask = write_study(tmp_path / "in")
    assert synth(fake_model, tmp_path / "local", mask, "--format", "dicom") == 0
    with archive(tmp_path / "pacs") as (port, seen), Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node:
        echo = associate(node.port, ["1.2.840.10008.1.1"])
        assert echo.send_c_echo().Status == 0
        echo.release()
        assert push(node.port, mask) == [0]
        until(lambda: node.said("settled"), "the study is sent")
        sent, local = read_all(tmp_path / "pacs"), read_all(tmp_path / "local")
        assert len(local) == 6 and sorted(seen) == sorted(local) and sent == local
        assert all(sent[uid].PixelData == local[uid].PixelData for uid in local)
        assert not [p for p in (tmp_path / "spool").rglob("*") if p.is_file() and p.suffix == ".dcm"]
        code, seconds = node.stop()
    assert code == 0 and seconds < 5
