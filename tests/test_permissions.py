"""What is made of a DICOM source only its owner may read, unless it is shared; else the umask
decides.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import serve, write_study
from samples import write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import UsageError
from runtime.io.writers.registry import FORMATS
from runtime.service.study_spool import Spool

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """The permissions of a folder and all below, hidden files too."""
    everything = [folder, *folder.rglob("*")]
    return {
        path.relative_to(folder.parent).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in everything
    }


def open_to_others(folder: Path) -> list[str]:
    return [name for name, mode in modes(folder).items() if mode & 0o077]


def mask2ct(command: str, source: Path, model: Path, out: Path, *options: str) -> int:
    return run(
        main,
        [
            command,
            str(source),
            "--model",
            str(model),
            "--backend",
            "fake",
            "--output",
            str(out),
            "--quiet",
            *options,
        ],
    )


@pytest.mark.parametrize("name", FORMATS)
def test_dicom_results_are_private(name: str, fake_model: Path, tmp_path: Path) -> None:
    study, out, report = write_study(tmp_path / "in"), tmp_path / "out", tmp_path / "report.json"
    assert (
        mask2ct(
            "synth",
            study,
            fake_model,
            out,
            "--format",
            name,
            "--variants",
            "2",
            "--report",
            str(report),
        )
        == 0
    )
    # an index names what is there, and nothing of a patient; the folder is private
    index = {"dataset.json", "splits_final.json", "synthetic.csv"}
    wide = [path for path in open_to_others(out) if Path(path).name not in index]
    assert len(modes(out)) > 4 and wide == [] and stat.S_IMODE(report.stat().st_mode) == 0o600
    assert modes(out)["out"] == 0o700 and set(modes(out).values()) <= {0o700, 0o600, 0o644}


@pytest.mark.parametrize("options", [(), ("--shared",)])
def test_shared_or_plain_results_follow_umask(
    options: tuple[str, ...], fake_model: Path, tmp_path: Path
) -> None:
    """Results of other masks than DICOM's, and those with --shared, follow the umask."""
    source = write_study(tmp_path / "in") if options else write_mask(tmp_path / "case.nii.gz")
    assert (
        mask2ct("synth", source, fake_model, tmp_path / "out", "--format", "dicom", *options) == 0
    )
    assert set(modes(tmp_path / "out").values()) == {0o755, 0o644}


def test_result_mode_follows_its_source(fake_model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_study(folder / "study")
    write_mask(folder / "case.nii.gz")
    assert mask2ct("synth", folder, fake_model, out) == 0
    made = {name: mode for name, mode in modes(out).items() if name.endswith(".nii.gz")}
    assert made.pop("out/case_ct.nii.gz") == 0o644 and [*made.values()] == [0o600]


def test_watch_results_keep_inbox_mode(fake_model: Path, tmp_path: Path) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    write_study(inbox / "study")
    write_mask(inbox / "case.nii.gz")
    (inbox / "damaged.nii.gz").write_bytes(b"\0")
    (inbox / "broken").mkdir()
    (inbox / "broken" / "torn.dcm").write_bytes(
        (inbox / "study" / "Doe_John_Planted.dcm").read_bytes()[:3000]
    )
    inbox.chmod(0o750)
    assert (
        mask2ct("watch", inbox, fake_model, out, "--once", "--stable", "0", "--poll", "0.05") == 1
    )
    seen = modes(inbox)
    assert {seen[f"inbox/{name}"] for name in ("done", "failed", ".work")} == {0o750}
    assert seen["inbox/failed/damaged.nii.gz.reason.txt"] == 0o644
    assert seen["inbox/failed/broken.reason.txt"] == 0o600
    results = modes(out)
    assert results["out/.mask2ct.journal"] == 0o600 if "out/.mask2ct.journal" in results else True
    assert [
        mode for name, mode in results.items() if name.endswith(".nii.gz") and "case" not in name
    ] == [0o600]


def test_serve_narrows_wide_spool(fake_model: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    (spool / "incoming").mkdir(parents=True)
    opened = Spool(spool)
    opened.close()
    assert opened.narrowed and stat.S_IMODE(spool.stat().st_mode) == 0o700
    again = Spool(spool)
    again.close()
    assert not again.narrowed


def test_serve_refuses_world_readable_folder(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that others read and that holds other files is refused and left as it is."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("not ours")
    with pytest.raises(UsageError, match="read by others"):
        Spool(tmp_path / "home")
    assert serve(fake_model, tmp_path / "home", "--allow", "A", "--keep") == 2
    assert "chmod 700" in capsys.readouterr().err and modes(tmp_path / "home")["home"] == 0o755
