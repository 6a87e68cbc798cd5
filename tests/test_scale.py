"""Ray: the bytes of a single process, whoever dies meanwhile, on this machine and on a cluster;
and its processes end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from samples import blobs, results, synth, write_mask

from runtime.batch.completion_log import JOURNAL

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is absent: pip install "mask2ct[ray]"'
)
Start = Callable[..., "subprocess.Popen[str]"]

# For the processes of workers alone: they die when they open a mask of that name, as of one that
# takes all their memory.
DEADLY = """
import os, sys
if sys.argv and "worker" in os.path.basename(sys.argv[0]):
    sys.addaudithook(lambda event, about: event == "open" and "deadly" in str(about[0]) and os.kill(os.getpid(), 9))
"""
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    for n in range(200):
        write_mask(
            folder / f"case{n:03}.nii.gz", blobs((8, 32, 32), seed=n), spacing=(1.0, 1.0, 2.0)
        )
    return folder


@pytest.fixture(scope="module")
def whole(
    masks: Path, fake_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a single process makes of the masks."""
    out = tmp_path_factory.mktemp("whole")
    assert synth(fake_model, out, masks) == 0
    assert len(results(out)) == 200
    return results(out)


@pytest.fixture
def start(fake_model: Path, root: Path) -> Iterator[Start]:
    """Begin `mask2ct synth` on two workers; at the end nobody whom it started is left."""
    begun: list[subprocess.Popen[str]] = []

    def start(
        out: Path,
        *arguments: str | Path,
        address: str | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        ray = ["--ray", *([address] if address else []), "--ray-workers", "2", "--workers", "1"]
        line = [
            sys.executable,
            "-m",
            "runtime",
            "synth",
            *arguments,
            "--model",
            fake_model,
            "--backend",
            "fake",
            "--output",
            out,
            "--quiet",
            *ray,
        ]
        process = subprocess.Popen(
            list(map(str, line)),
            cwd=root,
            env={**os.environ, **(env or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def children(of: int) -> dict[int, str]:
    """Every process that descends from one, with its command line."""
    found, parents = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except (ValueError, OSError):
            continue
    for process in parents:
        above = process
        while above in parents and above != of:
            above = parents[above]
        if above == of and process != of:
            try:
                found[process] = (
                    Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                )
            except OSError:
                continue
    return found


def listening(processes: Iterable[int]) -> set[str]:
    """The addresses on which they take TCP connections."""
    sockets = set()
    for process in processes:
        try:
            sockets |= {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()}
        except OSError:
            continue
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for _, local, _, state, *_, inode in [
            line.split()[:10] for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]:
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = bytes.fromhex(
                    local.partition(":")[0]
                )  # 32-bit words in this machine's order
                found.add(
                    socket.inet_ntop(
                        family, b"".join(words[n : n + 4][::-1] for n in range(0, len(words), 4))
                    )
                )
    return found


def assert_ended(processes: Iterable[int], within: float = 30) -> None:
    """Those that still run end in so many seconds."""
    for process in processes:
        try:
            handle = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        try:
            assert select.select([handle], [], [], within)[0], f"{process} still runs"
        finally:
            os.close(handle)


def wait_until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue


def done(out: Path) -> int:
    """Results that the journal holds."""
    return (out / JOURNAL).read_bytes().count(b"\n") if (out / JOURNAL).exists() else 0


@needs_ray
@pytest.mark.slow
def test_ray_killed_worker_leaves_same_bytes(
    start: Start, masks: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Two workers, one of which is killed, leave the bytes that one process makes."""
    process = start(tmp_path, masks)
    wait_until(process, lambda: done(tmp_path) >= 20)
    family = children(process.pid)
    workers = [pid for pid, line in family.items() if "MapWorker" in line]
    assert len(workers) == 2
    addresses = listening(family)
    assert addresses and addresses <= {
        "127.0.0.1",
        "::1",
        "::ffff:127.0.0.1",
    }  # who reaches a Ray may run programs on it
    os.kill(workers[0], signal.SIGKILL)
    at = done(tmp_path)
    code, said, told = finish(process)
    assert code == 0 and said == "" and at < 200
    assert (
        "worker died or was killed while executing a task" in told
    )  # Ray's words: it had work in hand
    assert results(tmp_path) == whole and done(tmp_path) == 200
    assert_ended(family)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)]
)
def test_ray_stopped_driver_ends_and_resumes(
    number: signal.Signals,
    expected: int,
    start: Start,
    masks: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """When the driver is stopped, its workers end, and --resume makes the rest."""
    out, report = tmp_path / "out", tmp_path / "report.json"
    process = start(out, masks)
    wait_until(process, lambda: done(out) >= 20)
    family = children(process.pid)
    process.send_signal(number)
    assert finish(process)[0] == expected
    assert_ended(pid for pid, line in family.items() if "MapWorker" in line)
    if (
        number == signal.SIGTERM
        # after a kill Ray's own agents notice within a minute, and the next run removes what is
        # half-written
    ):
        assert_ended(family)
        assert not [name for name in results(out) if name.startswith(".")]
    kept = done(out)
    assert finish(start(out, masks, "--resume", "--report", report))[0] == 0
    assert results(out) == whole
    cases = json.loads(report.read_text())["cases"]
    assert len(cases) == 200 and sum(case["skipped"] for case in cases) == kept > 0


@needs_ray
@pytest.mark.slow
def test_ray_bad_masks_fail_alone(
    start: Start, fake_model: Path, masks: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A mask that cannot be used, or that kills every worker, fails alone."""
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    bad, deadly = tmp_path / "bad.nii.gz", write_mask(tmp_path / "deadly.nii.gz")
    bad.write_bytes(b"no volume")
    good = sorted(masks.iterdir())[:30]
    code, _, told = finish(
        start(
            tmp_path / "out", bad, *good[:9], deadly, *good[9:], env={"PYTHONPATH": str(tmp_path)}
        )
    )
    assert code == 1
    assert (
        len([line for line in told.splitlines() if line.startswith("error: ")]) == 2
        and "Traceback" not in told
    )
    assert (
        f"file      {bad}" in told
        and f"every worker that was given it died\n  file      {deadly}" in told
    )
    assert results(tmp_path / "out") == {
        name: data for name, data in whole.items() if name < "case030"
    }


@needs_ray
@pytest.mark.slow
def test_ray_two_nodes_make_nnunet_pairs(
    start: Start, fake_model: Path, masks: Path, root: Path, tmp_path: Path
) -> None:
    """A cluster of two nodes works from this folder and makes pairs for nnU-Net."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    some = sorted(masks.iterdir())[:12]
    options = ("--format", "nnunet", "--variants", "2", "--seed", "3")
    assert synth(fake_model, alone, *some, *options) == 0
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert cluster.stdin is not None and cluster.stdout is not None
    try:
        address = cluster.stdout.readline().strip()
        relative = Path(os.path.relpath(together, root))
        code, _, told = finish(start(relative, *reversed(some), *options, address=address))
        assert code == 0, told
    finally:
        family = children(cluster.pid)
        cluster.communicate(timeout=60)
    named = (
        json.dumps("together").encode(),
        json.dumps("alone").encode(),
    )  # the data set is called as its folder is
    assert {name: data.replace(*named) for name, data in results(together).items()} == results(
        alone
    )
    assert_ended(family)


@needs_ray
@pytest.mark.slow
def test_ray_errors_come_before_work(start: Start, masks: Path, tmp_path: Path) -> None:
    code, _, told = finish(start(tmp_path / "out", masks, "--ray-gpus", "2"))
    assert code == 2 and "2 GPUs each" in told and not (tmp_path / "out").exists()
    code, _, told = finish(start(tmp_path / "out", masks, address="127.0.0.1:9"))
    assert code == 2 and "no Ray answers at 127.0.0.1:9" in told and "Traceback" not in told


@pytest.fixture
def script(root: Path, model: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a block of docs/how-to/scaling.md beside a `runs/demo` with a small model; what it prints."""
    blocks = dict(
        re.findall(
            r"```python\n# (\w+\.py)\n(.*?)```",
            (root / "docs" / "how-to" / "scaling.md").read_text(),
            re.DOTALL,
        )
    )
    (tmp_path / "runs/demo/masks").mkdir(parents=True)
    (tmp_path / "runs/demo/model").symlink_to(model)
    for n in range(3):
        write_mask(
            tmp_path / f"runs/demo/masks/unseen_{n}.nii.gz",
            blobs((6, 40, 40), seed=n),
            direction=np.diag([1.0, -1.0, 1.0]),
        )

    def run(name: str, *arguments: str) -> str:
        (tmp_path / name).write_text(blocks[name])
        done = subprocess.run(
            [sys.executable, name, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@needs_ray
@pytest.mark.slow
def test_ray_embedding_example_equals_synthesizer(
    script: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    """The recipe for embedding makes the images that a synthesizer makes."""
    printed = script("on_ray.py").splitlines()
    assert "2 workers of Ray" in printed[0]
    assert sorted(printed[1:]) == sorted(
        f"unseen_{n} {v} ['unseen_{n}_v{v}_ct.nii.gz', 'unseen_{n}_v{v}_mask.nii.gz']"
        for n in range(3)
        for v in range(2)
    )
    assert (
        synth(
            model,
            tmp_path / "alone",
            tmp_path / "runs/demo/masks",
            "--variants",
            "2",
            "--seed",
            "7",
            backend=None,
        )
        == 0
    )
    assert results(tmp_path / "out") == results(tmp_path / "alone")


@needs_ray
@pytest.mark.slow
def test_ray_bucket_example_makes_missing_results(
    script: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    """The recipe for buckets makes the results that are missing."""
    masks, out = tmp_path / "runs/demo/masks", tmp_path / "bucket"
    urls = (masks.as_uri(), out.as_uri())
    assert synth(model, tmp_path / "alone", masks, "--seed", "7", backend=None) == 0
    assert sorted(script("buckets.py", *urls).splitlines()) == [
        f"unseen_{n}.nii.gz done" for n in range(3)
    ]
    assert results(out) == results(tmp_path / "alone")
    (out / "unseen_1_ct.nii.gz").unlink()
    assert script("buckets.py", *urls).splitlines() == ["unseen_1.nii.gz done"]
    assert results(out) == results(tmp_path / "alone") and script("buckets.py", *urls) == ""


def test_missing_ray_error_names_remedy(
    fake_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    mask = write_mask(tmp_path / "mask.nii.gz")
    assert synth(fake_model, tmp_path / "out", mask, "--ray") == 3
    assert (
        'pip install "mask2ct[ray]"' in capsys.readouterr().err and not (tmp_path / "out").exists()
    )


def test_ray_bad_address_options_are_refused(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad address is refused, and so are Ray's options without --ray."""
    mask = write_mask(tmp_path / "mask.nii.gz")
    assert synth(fake_model, tmp_path / "out", mask, "--ray", "masks") == 2
    assert "--ray=" in capsys.readouterr().err
    assert synth(fake_model, tmp_path / "out", mask, "--ray-workers", "2") == 2
    assert "--ray with them" in capsys.readouterr().err
    for option in ("--use=no-such", "--rules=no-such.json"):
        assert synth(fake_model, tmp_path / "out", mask, "--ray", option) == 2
        assert "one model" in capsys.readouterr().err
    assert (
        synth(fake_model, tmp_path / "out", mask, "--ray", "--ray-workers", "2", "--dry-run") == 0
    )
