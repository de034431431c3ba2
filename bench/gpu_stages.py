"""The stages of the GPU day: what each does on a GPU, and at tiny sizes on a CPU. Order and bookkeeping are in ``gpu_day.py``."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditscale.bench.gpu_day import FAILED, PARTIAL, TimeUp, Unavailable
from ditscale.bench.gpu_processes import (
    ROOT,
    find_tool,
    outcome,
    outcomes,
    own_command,
    python_command,
    without_places,
)

if TYPE_CHECKING:
    from ditscale.bench.gpu_day import Day, Stage
    from ditscale.bench.rows import Row

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A launch that ncu looks at closely: as in the tables, DiT-XL at 8,192 tokens in bfloat16.
LARGE = (32, 256, 1152, 16)
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
    (2, 257, 2048),
)
DTYPES = ("float32", "bfloat16", "float16")
_MOST_SECONDS = 180.0  # of a process that looks at kernels: one that hangs must not cost the call


def environment(day: Day) -> dict[str, Any]:
    """The machine, its versions and its state."""
    from ditscale.bench import devices

    facts = {"device": devices.machine(day.device), "versions": devices.versions(), **devices.commit()}
    return facts | {"state": devices.state(day.device)}


def build(day: Day) -> dict[str, Any]:
    """Compile the native libraries where this is a checkout, and load them."""
    from ditscale.kernels import library

    here = {name: library.path_of(name).is_file() for name in ("cpu", "cuda")}
    log = ""
    unfit = library.missing_reason("cuda")  # not there, of other sources, or of a system that this one is not
    if not day.dry and unfit:
        if not (ROOT / "setup.py").is_file():
            raise Unavailable(f"this is no checkout to build from: {unfit}")
        # In a process of its own: a library that is loaded once cannot be loaded again.
        exit_, _, errors = outcome([sys.executable, "setup.py", "build_native", "--inplace"], day, cwd=ROOT)
        log = without_places(errors[-4000:])
        if exit_ is None:
            raise TimeUp("the build did not end within this call's time")
        if exit_:
            return {"status": FAILED, "reason": "the build failed", "log": log}
        library.missing_reason.cache_clear()
    loaded = {name: library.missing_reason(name) for name in ("cpu", "cuda")}
    content = {"built_before": here, "missing": loaded, "log": log}
    if not day.dry and loaded["cuda"]:
        return content | {"status": FAILED, "reason": loaded["cuda"]}
    return content


def selfcheck(day: Day) -> dict[str, Any]:
    """What ``ditscale doctor --check`` finds."""
    if day.dry:
        from ditscale.kernels.doctor import report

        facts = report(check=True)
    else:
        command = [*python_command(), "-m", "ditscale", "doctor", "--check", "--json"]
        exit_, out, errors = outcome(command, day, most=_MOST_SECONDS)
        if not out.rstrip().endswith("}"):
            return {"status": FAILED, "reason": f"doctor ended with {exit_}", "log": without_places(errors[-4000:])}
        facts = json.loads(out.splitlines()[-1])
    wrong = [c for c in facts["checks"] if not c["passed"]]
    content = {"doctor": facts}
    if wrong:
        first = wrong[0]
        reason = f"{len(wrong)} wrong, first {first['operator']} {first['backend']} {first['dtype']}: {first['reason']}"
        return content | {"status": FAILED, "reason": reason}
    return content


def _checks(day: Day, ops: Sequence[str], dtypes: Sequence[str]) -> Iterator[Row]:
    """Every backend, pass and shape of some operators against float64, without a clock."""
    from ditscale.bench.cases import operator_case
    from ditscale.bench.correctness import judge
    from ditscale.bench.operators import operator_subject
    from ditscale.errors import BackendUnavailable

    shapes = SHAPES[:1] if day.dry else SHAPES
    for op in ops:
        for dtype in dtypes:
            for B, T, D in shapes:
                if op == "qk_norm_rope" and D % 2:
                    continue  # pairs of numbers are rotated
                # Heads of 72 for the width of DiT-XL, of 64 and 128 and, for the narrow ones, one head.
                heads = next((h for h in (16, 12, 6) if D % h == 0 and D >= 384 and D // h in (64, 72, 128)), 1)
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
    """All operators on this device against float64.

    On a GPU each with each dtype in a process of its own: one that breaks its context breaks no other's, and all cores share what
    is most of the time, Triton's compiler. What they compiled the self-check finds in its cache.
    """
    late: list[str] = []
    if day.dry:
        rows = list(_checks(day, _operators(), DTYPES[:1]))
    else:
        pairs = [(op, dtype) for op in reversed(_operators()) for dtype in DTYPES]  # attention compiles longest
        done = outcomes([own_command("--check", f"{op} {dtype}") for op, dtype in pairs], day, most=_MOST_SECONDS)
        rows = []
        for (op, dtype), (exit_, out, errors) in zip(pairs, done, strict=True):
            rows += [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
            case = f"{op}/{dtype}"
            if exit_ is None:
                late.append(case)
            elif exit_:
                reason = without_places(" ".join(errors.split())[-300:])
                rows.append({"case": case, "provider": "all", "status": "failed", "reason": reason})
    bad = [r for r in rows if r["status"] in ("wrong", "failed")]
    content: dict[str, Any] = {"checked": len(rows), "bad": bad, "rows": rows}
    if bad:
        reason = f"{len(bad)} of {len(rows)} wrong, first {bad[0]['case']}: {bad[0]['reason']}"
        return content | {"status": FAILED, "reason": reason}
    return content | ({"status": PARTIAL, "reason": f"no time for {', '.join(late)}"} if late else {})


def check(op: str, dtype: str) -> int:
    """The checks of an operator and a dtype, and what its self-check says, as lines of JSON."""
    import time

    import torch

    from ditscale.bench.gpu_day import Day
    from ditscale.kernels import dispatch, selfcheck

    for backend in ("cuda", "triton"):
        if dispatch.unavailable_reason(op, backend, "cuda") is None:
            wrong = selfcheck.compare(op, backend, getattr(torch, dtype), "cuda")
            row = {"case": f"self-check of {op}/{dtype}", "provider": f"ours-{backend}", "reason": wrong}
            print(json.dumps(row | {"status": "wrong" if wrong else "right"}), flush=True)
    for row in _checks(Day(Path(), "cuda", False, time.monotonic()), (op,), (dtype,)):
        print(json.dumps(row), flush=True)
    return 0


def gpu_tests(day: Day) -> dict[str, Any]:
    """The test suite's own GPU tests, where it is here."""
    tests = ROOT / "tests" / "kernels"
    if day.dry:
        return {}
    if not tests.is_dir() or not importlib.util.find_spec("pytest"):
        raise Unavailable("the tests or pytest are not on this machine")
    # A warning of another torch or Python is no finding here.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", str(tests)]
    command += ["-n", "6"] if importlib.util.find_spec("xdist") else []
    exit_, out, errors = outcome(command, day, cwd=ROOT, most=_MOST_SECONDS)
    content = {"pytest_exit": exit_, "pytest": without_places(out[-6000:] + errors[-1000:])}
    if exit_ is None:
        return content | {"status": PARTIAL, "reason": "the tests did not end within this call's time"}
    return content | ({"status": FAILED, "reason": without_places(out[-300:])} if exit_ else {})


def _operators() -> tuple[str, ...]:
    from ditscale.bench.cases import ADALN_OPS, ATTENTION_OPS

    return (*ADALN_OPS, "bias_gelu", *ATTENTION_OPS)


def exercise(backend: str, large: bool) -> int:
    """Forward and backward of every operator that a backend has, for tools that watch a process: on small odd shapes and in all
    that the self-check calls, or once at a shape of the tables. The exit status: 0, or 3 where nothing ran."""
    import torch

    from ditscale.bench.cases import operator_case
    from ditscale.bench.operators import operator_subject
    from ditscale.errors import BackendUnavailable
    from ditscale.kernels import selfcheck

    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    shapes = (LARGE,) if large else ((2, 7, 26, 1), (2, 37, 384, 6), (1, 17, 1152, 16))
    ran: set[str] = set()
    for op in _operators():
        for B, T, D, H in shapes:
            for dtype in ("bfloat16",) if large else ("float32", "bfloat16"):
                case = operator_case(op, "forward_backward", dtype, B, T, D, H, cache="resident")
                build = operator_subject(case, device, 1).build
                name = "reference" if backend == "reference" else f"ours-{backend}"
                with contextlib.suppress(BackendUnavailable, KeyError):  # not every backend has every operator
                    build[name]().results()
                    ran.add(op)
        if op in ran and not large:  # modulation per token and shared, norms, wide rows, heads of every width
            for dtype in DTYPES:
                selfcheck.compare(op, backend, getattr(torch, dtype), device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{backend}: ran {', '.join(sorted(ran)) or 'nothing'}", file=sys.stderr)
    return 0 if ran else 3


def sanitizer(day: Day) -> dict[str, Any]:
    """compute-sanitizer's four tools over the C++ kernels, and memcheck over Triton's, whose barriers are the compiler's."""
    from ditscale.kernels import library

    found: dict[str, Any] = {}
    if day.dry:
        backend = "reference" if library.missing_reason("cpu") else "cpu"
        nothing = exercise(backend, large=False)
        return {"tools": found} | ({"status": FAILED, "reason": f"{backend}: no operator ran"} if nothing else {})
    tool = find_tool("compute-sanitizer")
    # Else torch's allocator hands out parts of one block, and a step over the end of a tensor is none over that of the block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pairs = [(name, "cuda") for name in SANITIZERS] + [("memcheck", "triton")]
    # Beside one another: each waits for its own patched kernels, and what one finds no other loses.
    commands = [
        [tool, "--tool", n, "--error-exitcode", "9", *own_command("--exercise", backend)] for n, backend in pairs
    ]
    done = outcomes(commands, day, environment=environment, most=_MOST_SECONDS)
    for (name, backend), (exit_, out, errors) in zip(pairs, done, strict=True):
        found[f"{name} {backend}"] = {"exit": exit_, "tail": without_places((out + errors)[-2000:])}
    bad = [name for name, item in found.items() if item["exit"]]
    late = [name for name, item in found.items() if item["exit"] is None]
    if bad:
        return {"tools": found, "status": FAILED, "reason": f"errors under {', '.join(bad)}"}
    return {"tools": found} | ({"status": PARTIAL, "reason": f"no time for {', '.join(late)}"} if late else {})


def suite(name: str, *, whole_grid: bool = False, share: float = 1.0) -> Stage:
    """A benchmark suite, case by case; what is in the folder already, of this commit and device, is not measured again.
    ``share`` of the time that is left when it begins is its own, so that the suites behind it have some too."""

    def stage(day: Day) -> dict[str, Any]:
        from ditscale.bench.cases import cases
        from ditscale.bench.rows import read_rows, write_rows
        from ditscale.bench.runner import Session
        from ditscale.bench.timing import TINY, Protocol
        from ditscale.kernels import selfcheck

        path = day.out / f"rows-{name}{'-grid' if whole_grid else ''}.jsonl"
        leave = max(45.0, (1 - share) * day.seconds_left)
        session = Session(
            device=day.device,
            protocol=TINY if day.dry else Protocol(seconds=2.0),
            allow_noise=True,  # the hour is short; every row says how noisy it was
            # A dry run is about this code, not about the compiler's half minute.
            against=("eager",) if day.dry else (),
            tiny=day.dry,
            whole_grid=whole_grid,
            say=lambda line: None,
        )
        ceilings = session.start()
        rows = [row for row in (read_rows(path) if path.is_file() else []) if _of_this(row, session.common)]
        if not rows:
            rows = ceilings + (list(session.host_rows()) if name == "adaln" and not whole_grid else [])
        # The grid leaves out what the suite's own cases have.
        others = [p for p in day.out.glob(f"rows-{name}.jsonl") if p != path]
        done = {r["case"] for r in (*rows, *(r for p in others for r in read_rows(p) if _of_this(r, session.common)))}
        every = cases(name, day.device, tiny=day.dry, whole_grid=whole_grid)
        todo = [case for case in every if case.id not in done]
        for number, case in enumerate(todo[:2] if day.dry else todo):
            if day.seconds_left < leave and not day.dry:
                raise TimeUp(f"{len(todo) - number} of {len(every)} cases to go")
            rows += session.case(case)
            write_rows(path, rows)
            if selfcheck.context_is_lost(day.device):  # what follows would fail for it, and count as measured
                raise RuntimeError(f"the device's context is lost after {case.id}")
        wrong = [r for r in rows if r["status"] == "wrong" and r["provider"].startswith("ours")]
        content = {"rows": len(rows), "file": path.name}
        if wrong:
            first = ", ".join(f"{r['case']} {r['provider']}" for r in wrong[:3])
            return content | {"status": FAILED, "reason": f"{len(wrong)} wrong results: {first}"}
        return content

    return stage


def _of_this(row: Row, common: Row) -> bool:
    return bool(row["commit"] == common["commit"] and row["device"]["name"] == common["device"]["name"])


def profile(day: Day) -> dict[str, Any]:
    """ncu's metrics of our kernels at a shape of the tables."""
    from ditscale.bench.budget import FOLDER, load

    names = {entry.kernel for path in FOLDER.glob("*.jsonl") for entry in load(path.stem).values()}
    if day.dry:
        return {"kernels": {}, "looked_for": sorted(names)}
    tool = find_tool("ncu")
    chosen = ["--clock-control", "none", "--kernel-name", f"regex:^({'|'.join(sorted(names))})$"]
    kernels: dict[str, list[dict[str, str]]] = {}
    reasons: list[str] = []
    for backend in ("cuda", "triton"):
        command = [tool, *chosen, "--csv", "--page", "raw", "--metrics", ",".join(NCU_METRICS)]
        exit_, out, errors = outcome(
            [*command, *own_command("--exercise", backend, "--large")], day, most=_MOST_SECONDS
        )
        if exit_ != 0:
            # Counters are closed to users on many rented machines.
            reasons.append(f"ncu, {backend}: {without_places(' '.join((out + errors).split())[-300:])}")
            continue
        lines = [line for line in out.splitlines() if line.startswith('"')]
        wanted = ("Kernel Name", "Grid Size", "Block Size", *NCU_METRICS)  # and not the host's name
        kernels[backend] = [{k: row.get(k, "") for k in wanted} for row in csv.DictReader(lines)]
    if not kernels:
        raise Unavailable("; ".join(reasons))
    return {"kernels": kernels} | ({"status": PARTIAL, "reason": reasons[0]} if reasons else {})


def study_config(*, dry: bool) -> Any:
    """1e14 to 1e16 FLOPs on emoji scenes of 32 pixels, then 1e17, the lowest budget of arXiv:2410.08184; a dry run: the
    same code at a millionth."""
    from ditscale.dit.data import emoji_vocabulary
    from ditscale.scaling.study import StudyConfig

    budgets = (9e7, 1.8e8, 3.6e8) if dry else (1e14, 3.2e14, 1e15, 3.2e15, 1e16)
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
    if dry:
        training: dict[str, Any] = {"batch": 8, "lr": 3e-3, "evaluation_images": 8, "evaluation_times": 2}
    else:
        # A batch that leaves the smallest budget 300 steps and the predicted run enough work for a GPU.
        training = {"batch": 128, "lr": 3e-3, "precision": "bfloat16"}
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
        # Small models leave most of a GPU idle: several train at once.
        workers=1 if dry else 4,
        threads=1 if dry else max(1, (os.cpu_count() or 1) // 4),
    )


def study(day: Day) -> dict[str, Any]:
    """A small isoFLOP study, its prediction of a run of ten times its largest budget, and that run."""
    from ditscale.dit.files import read_json
    from ditscale.dit.training import TrainConfig, train
    from ditscale.scaling.study import Study, design

    folder = day.out / "study"
    if not (folder / "study.json").is_file():
        Study.create(folder, study_config(dry=day.dry))
    if day.dry:
        design(study_config(dry=False))  # the real grid can be laid out
        # One run of the grid; a law of runs this small would be noise, and the demo's tests carry a whole study out.
        planned = Study(folder).grid[0]
        record = train(TrainConfig.from_dict(planned.training), Study(folder).run_folder(planned.run_id))
        return {"runs": len(Study(folder).grid), "trained": record["run_id"], "loss": record["loss"]}
    # In a process of its own that is stopped as by Ctrl-C when the time is up: studies resume.
    process = subprocess.Popen(
        own_command("--conduct", str(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=max(1.0, day.seconds_left - 40))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()  # a study survives that too; what is lost is the time since the last checkpoint
            process.communicate()
        raise TimeUp("the study goes on in the next call") from None
    if process.returncode:
        return {"status": FAILED, "reason": without_places(errors[-500:])}
    return {"outcome": read_json(folder / "outcome.json")}


def conduct_study(folder: Path) -> int:
    """All that a study still lacks, in this process."""
    from ditscale.scaling.conduct import conduct
    from ditscale.scaling.study import Study

    conduct(Study(folder), show=lambda stage, progress: None, say=lambda line: print(line, file=sys.stderr))
    return 0


def results(day: Day) -> dict[str, Any]:
    """All rows in one file under the device's name, and the table and figures that follow from them."""
    from ditscale.bench import devices
    from ditscale.bench.figures import draw_all
    from ditscale.bench.report import full_table
    from ditscale.bench.rows import read_rows, write_rows

    every = [row for path in sorted(day.out.glob("rows-*.jsonl")) for row in read_rows(path)]
    if not every:
        return {"status": PARTIAL, "reason": "no suite has been measured yet"}
    ceilings = {row["case"]: row for row in every if row["suite"] == "ceiling"}  # each suite measures its own
    rows = [*ceilings.values(), *(row for row in every if row["suite"] != "ceiling")]
    path = write_rows(day.out / f"{devices.slug(devices.machine(day.device))}.jsonl", rows)
    (day.out / "table.md").write_text(full_table(rows) + "\n")
    figures = [p.name for p in draw_all(rows, day.out / "figures")]
    return {"file": path.name, "rows": len(rows), "figures": figures}
