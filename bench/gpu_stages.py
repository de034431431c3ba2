"""The stages of the GPU day: what each does on a GPU, and at tiny sizes on a CPU. Order and bookkeeping are in ``gpu_day.py``."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditscale.bench.gpu_day import DONE, FAILED, PARTIAL, TimeUp, Unavailable

if TYPE_CHECKING:
    from ditscale.bench.gpu_day import Day, Stage
    from ditscale.bench.rows import Row

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What says whether a memory-bound kernel is at its roof, and why not.
NCU_METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "smsp__inst_executed_op_local_ld.sum",
)
# (B, T, D): primes and tails, one token, the models' widths, and many rows of few tokens.
SHAPES = (
    (2, 7, 13),
    (3, 1, 64),
    (2, 70, 24),
    (4, 37, 384),
    (2, 256, 1152),
    (1, 1024, 768),
    (64, 16, 1024),
    (2, 33, 2240),
)
DTYPES = ("float32", "bfloat16", "float16")


def environment(day: Day) -> dict[str, Any]:
    """The machine, its versions and its state."""
    from ditscale.bench import devices

    facts = {"device": devices.machine(day.device), "versions": devices.versions(), **devices.commit()}
    return facts | {"state": devices.state(day.device)}


def build(day: Day) -> dict[str, Any]:
    """Compile the native libraries where this is a checkout, and load them."""
    from ditscale.kernels import library

    root = Path(__file__).resolve().parent.parent
    here = {name: library.path_of(name).is_file() for name in ("cpu", "cuda")}
    log = ""
    if not day.dry and not here["cuda"]:
        if not (root / "setup.py").is_file():
            raise Unavailable("this is no checkout to build from, and the package holds no libditscale_cuda")
        # In a process of its own: a library that is loaded once cannot be loaded again.
        done = _run([sys.executable, "setup.py", "build_native", "--inplace"], day, cwd=root)
        log = done.stderr[-4000:]
        if done.returncode:
            return {"status": FAILED, "reason": "the build failed", "log": log}
        library.missing_reason.cache_clear()
    loaded = {name: library.missing_reason(name) for name in ("cpu", "cuda")}
    content = {"built_before": here, "missing": loaded, "log": log}
    if not day.dry and loaded["cuda"]:
        return content | {"status": FAILED, "reason": loaded["cuda"]}
    return content


def selfcheck(day: Day) -> dict[str, Any]:
    """What ``ditscale doctor --check`` finds."""
    from ditscale.kernels.doctor import report

    facts = report(check=True)
    wrong = [c for c in facts["checks"] if not c["passed"]]
    content = {"doctor": facts}
    if wrong:
        first = wrong[0]
        reason = f"{len(wrong)} wrong, first {first['operator']} {first['backend']} {first['dtype']}: {first['reason']}"
        return content | {"status": FAILED, "reason": reason}
    return content


def _checks(day: Day) -> Iterator[Row]:
    """Every operator, backend, dtype, pass and shape against float64, without a clock."""
    from ditscale.bench.cases import ADALN_OPS, operator_case
    from ditscale.bench.correctness import judge
    from ditscale.bench.operators import operator_subject
    from ditscale.errors import BackendUnavailable

    shapes = SHAPES[:1] if day.dry else SHAPES
    for op in (*ADALN_OPS, "bias_gelu", "attention"):
        for dtype in DTYPES[:1] if day.dry else DTYPES:
            for B, T, D in shapes:
                # Attention has heads: of 72 for the width of DiT-XL, of 64 or one head elsewhere.
                heads = next((h for h in (16, 12, 6) if D % h == 0 and D >= 384), 1)
                case = operator_case(op, "forward_backward", dtype, B, T, D, heads, cache="resident")
                subject = operator_subject(case, day.device, 1)
                exact, plain = subject.exact(), subject.build["eager"]().results()
                for name in subject.build:
                    if name != "reference" and not name.startswith("ours"):
                        continue
                    row: Row = {"case": case.id, "provider": name}
                    try:
                        verdict = judge(subject.build[name]().results(), exact, plain)
                    except BackendUnavailable as error:
                        yield row | {"status": "unavailable", "reason": str(error)}
                        continue
                    except Exception as error:  # a kernel that cannot be launched is a finding like a wrong number
                        yield row | {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
                        continue
                    status = "wrong" if verdict.reason else "right"
                    yield row | {
                        "status": status,
                        "reason": verdict.reason,
                        "error": verdict.error,
                        "plain": verdict.plain_error,
                    }


def operators_against_float64(day: Day) -> dict[str, Any]:
    """All operators on this device against float64, and the test suite's own GPU tests where it is here."""
    rows = list(_checks(day))
    bad = [r for r in rows if r["status"] in ("wrong", "failed")]
    content: dict[str, Any] = {"checked": len(rows), "bad": bad, "rows": rows}
    tests = Path(__file__).resolve().parent.parent / "tests"
    if not day.dry and tests.is_dir() and importlib.util.find_spec("pytest"):
        done = _run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)], day, cwd=tests.parent)
        content |= {"pytest_exit": done.returncode, "pytest": done.stdout[-4000:]}
        if done.returncode not in (0, 5):  # 5: no test bears the mark
            bad.append({"case": "pytest -m gpu", "reason": done.stdout[-300:]})
    if bad:
        return content | {
            "status": FAILED,
            "reason": f"{len(bad)} of {len(rows)} wrong, first {bad[0]['case']}: {bad[0]['reason']}",
        }
    return content


def exercise(backend: str) -> None:
    """One forward and backward pass of every operator of a backend on small shapes, for tools that watch a process."""
    import torch

    from ditscale.bench.cases import ADALN_OPS, operator_case
    from ditscale.bench.operators import operator_subject
    from ditscale.kernels import dispatch

    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    for op in (*ADALN_OPS, "bias_gelu"):
        if backend not in ("reference", *dispatch.BACKENDS[op]):
            continue
        for B, T, D in ((2, 7, 13), (2, 37, 384), (1, 17, 1152)):
            for dtype in ("float32", "bfloat16"):
                subject = operator_subject(
                    operator_case(op, "forward_backward", dtype, B, T, D, 1, cache="resident"), device, 1
                )
                subject.build["reference" if backend == "reference" else f"ours-{backend}"]().results()
    if device == "cuda":
        torch.cuda.synchronize()


def sanitizer(day: Day) -> dict[str, Any]:
    """compute-sanitizer's four tools over the C++ kernels; Triton's are the compiler's to check, memcheck apart."""
    found: dict[str, Any] = {}
    if day.dry:
        exercise("cpu" if _runs("cpu") else "reference")
        return {"tools": found}
    tool = _tool("compute-sanitizer")
    for name in SANITIZERS:
        for backend in ("cuda", "triton") if name == "memcheck" else ("cuda",):
            command = [tool, "--tool", name, "--error-exitcode", "9", *_self("--exercise", backend)]
            done = _run(command, day)
            found[f"{name} {backend}"] = {"exit": done.returncode, "tail": (done.stdout + done.stderr)[-2000:]}
    bad = [name for name, item in found.items() if item["exit"]]
    return {"tools": found} | ({"status": FAILED, "reason": f"errors under {', '.join(bad)}"} if bad else {})


def suite(name: str) -> Stage:
    """A benchmark suite, case by case; what is in the folder already, of this commit, is not measured again."""

    def stage(day: Day) -> dict[str, Any]:
        from ditscale.bench.cases import cases
        from ditscale.bench.rows import read_rows, write_rows
        from ditscale.bench.runner import Session
        from ditscale.bench.timing import TINY, Protocol

        path = day.out / f"rows-{name}.jsonl"
        session = Session(
            device=day.device,
            protocol=TINY if day.dry else Protocol(seconds=2.0),
            allow_noise=True,  # the hour is short; every row says how noisy it was
            # A dry run is about this code, not about the compiler's half minute.
            against=("eager",) if day.dry else (),
            tiny=day.dry,
            say=lambda line: None,
        )
        rows = read_rows(path) if path.is_file() else []
        ceilings = session.start()
        rows = [
            r
            for r in rows
            if r["commit"] == session.common["commit"] and r["device"]["name"] == session.common["device"]["name"]
        ]
        if not rows:
            rows = ceilings + (list(session.host_rows()) if name == "adaln" else [])
        done = {r["case"] for r in rows}
        todo = [case for case in cases(name, day.device, tiny=day.dry) if case.id not in done]
        for case in todo[:2] if day.dry else todo:
            if day.seconds_left < 45 and not day.dry:
                raise TimeUp(f"{len([c for c in todo if c.id not in done])} of {len(todo) + len(done)} cases to go")
            rows += session.case(case)
            done.add(case.id)
            write_rows(path, rows)
        bad = [
            f"{r['case']} {r['provider']}" for r in rows if r["status"] == "wrong" and r["provider"].startswith("ours")
        ]
        content = {"rows": len(rows), "file": path.name}
        return content | ({"status": FAILED, "reason": f"wrong results: {', '.join(bad[:3])}"} if bad else {})

    return stage


def profile(day: Day) -> dict[str, Any]:
    """ncu's metrics of every kernel that the exercise launches."""
    if day.dry:
        return {"kernels": []}
    tool = _tool("ncu")
    kernels: dict[str, list[dict[str, str]]] = {}
    for backend in ("cuda", "triton"):
        command = [tool, "--csv", "--page", "raw", "--metrics", ",".join(NCU_METRICS), *_self("--exercise", backend)]
        done = _run(command, day)
        if done.returncode:
            # Counters are closed to users on many rented machines.
            raise Unavailable(f"ncu: {' '.join((done.stdout + done.stderr).split())[-300:]}")
        lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
        kernels[backend] = list(csv.DictReader(lines))
    return {"kernels": kernels}


def study_config(*, dry: bool, training: dict[str, Any]) -> Any:
    """1e14 to 1e16 FLOPs on emoji scenes of 32 pixels, then 1e17, the lowest budget of arXiv:2410.08184; a dry run: the
    same code at a hundred-millionth."""
    from ditscale.dit.data import emoji_vocabulary
    from ditscale.scaling.study import StudyConfig

    budgets = (1.2e8, 2.4e8, 4.8e8) if dry else (1e14, 3.2e14, 1e15, 3.2e15, 1e16)
    model = {
        "image_size": 16 if dry else 32,
        "latent_factor": 1,
        "in_channels": 3,
        "patch": 4 if dry else 2,
        "condition": "caption",
        "vocabulary_size": len(emoji_vocabulary()),
        "learn_sigma": False,
        "mup_base_width": 64,
    }
    return StudyConfig(
        name="GPU day, dry run" if dry else "emoji scenes, 1e14 to 1e17 FLOPs",
        budgets=tuple(int(b) for b in budgets),
        target=int(1e9 if dry else 1e17),
        sizes=4 if dry else 5,
        span=6.0,
        # Of the order that the demo's study and the published law give, carried to these budgets; the parabola finds the rest.
        prior_coefficient=0.75,
        prior_exponent=0.405 if dry else 0.42,
        widths=(4, 8, 12, 16, 20, 24) if dry else tuple(range(32, 1025, 16)),
        head_width=8 if dry else 64,
        depth=1 if dry else None,
        model=model,
        training=training,
        workers=1,
        threads=1 if dry else (os.cpu_count() or 1),
    )


def study(day: Day) -> dict[str, Any]:
    """A small isoFLOP study, its prediction of a run of ten times its largest budget, and that run."""
    from ditscale.dit.checkpoint import read_json
    from ditscale.dit.training import TrainConfig, train
    from ditscale.scaling.study import Study, design

    known = {f.name for f in dataclasses.fields(TrainConfig)}
    on_gpu = {"device": "cuda", "dtype": "bfloat16", "precision": "bfloat16"}
    training: dict[str, Any] = {"batch": 8 if day.dry else 64, "lr": 3e-3}
    if day.dry:
        design(study_config(dry=False, training={"batch": 64, "lr": 3e-3}))  # the real grid can be laid out
        training |= {"evaluation_images": 8, "evaluation_times": 2}
    else:
        training |= {name: value for name, value in on_gpu.items() if name in known}
        if "device" not in known:
            raise Unavailable("the trainer has no device setting yet: it trains on the CPU only")
    folder = day.out / "study"
    if not (folder / "study.json").is_file():
        Study.create(folder, study_config(dry=day.dry, training=training))
    if day.dry:
        # One run of the grid; a law of runs this small would be noise, and the demo's tests carry a whole study out.
        planned = Study(folder).grid[0]
        record = train(TrainConfig.from_dict(planned.training), Study(folder).run_folder(planned.run_id))
        return {"runs": len(Study(folder).grid), "trained": record["run_id"], "loss": record["loss"]}
    # In a process of its own that is stopped as by Ctrl-C when the time is up: studies resume.
    command = [sys.executable, "-m", "ditscale", "study", "run", str(folder), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=max(1.0, day.seconds_left - 40))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=35)
        raise TimeUp("the study goes on in the next call") from None
    if process.returncode:
        return {"status": FAILED, "reason": errors[-500:]}
    return {"outcome": read_json(folder / "outcome.json")}


def results(day: Day) -> dict[str, Any]:
    """All rows in one file under the device's name, and the table that follows from them."""
    from ditscale.bench import devices
    from ditscale.bench.report import full_table
    from ditscale.bench.rows import read_rows, write_rows

    rows = [row for path in sorted(day.out.glob("rows-*.jsonl")) for row in read_rows(path)]
    if not rows:
        return {"status": PARTIAL, "reason": "no suite has been measured yet"}
    path = write_rows(day.out / f"{devices.slug(devices.machine(day.device))}.jsonl", rows)
    (day.out / "table.md").write_text(full_table(rows) + "\n")
    return {"status": DONE, "file": path.name, "rows": len(rows)}


def _runs(backend: str) -> bool:
    from ditscale.kernels.library import missing_reason

    return missing_reason(backend) is None


def _self(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ditscale.bench.gpu_day", *arguments]


def _tool(name: str) -> str:
    found = shutil.which(name) or next(
        (str(p) for p in Path("/usr/local").glob(f"cuda*/**/{name}") if p.is_file()), None
    )
    if found is None:
        raise Unavailable(f"{name} is not on this machine")
    return found


def _run(command: list[str], day: Day, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=max(1.0, day.seconds_left - 5))
    except subprocess.TimeoutExpired as error:
        raise TimeUp(f"{Path(command[0]).name} did not end within this call's time") from error
