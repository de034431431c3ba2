"""The ahead-of-time table put together: launches compiled, the CUDA library taken apart, predicted bytes and time at the roof,
and what is worse than the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ditscale.bench import aot, aot_cuda, budget, traffic
from ditscale.bench.aot import Entry
from ditscale.bench.budget import Finding
from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels.aot import ARCHITECTURES, Launch, Work
from ditscale.peaks import find_device, find_peak

CUDA = "cuda"


@dataclass
class Table:
    """Entries and what was found.

    Attributes:
        entries: kernels, in the order of their families and launches.
        launches: by name, what the kernels belong to.
        findings: where they are worse or better than the budget, and where the budget is stale.
        notes: what could not be looked at, with the reason.
        whole: families that were gathered without a filter, so that the budget can be replaced by what was found.
        traffic: what launches read and write, counted (see :mod:`ditscale.bench.traffic`).
        efficiency: useful over issued FLOPs of CUDA kernels by head width, by key of the entry.
    """

    entries: list[Entry] = field(default_factory=list)
    launches: dict[str, Launch] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    traffic: list[dict[str, Any]] = field(default_factory=list)
    efficiency: dict[str, dict[int, float]] = field(default_factory=dict)

    def of(self, level: str) -> list[Finding]:
        """Findings of a level."""
        return [f for f in self.findings if f.level == level]

    def write(self) -> list[str]:
        """Replace the budgets of the families that were gathered whole; returns the files."""
        paths = [budget.save(name, [e for e in self.entries if e.family == name]) for name in self.whole]
        if self.traffic:
            families = {row["family"] for row in self.traffic}
            others = [row for row in budget.load_traffic().values() if row["family"] not in families]
            paths.append(budget.save_traffic([*others, *self.traffic]))
        return [str(path) for path in paths]

    def sentence(self) -> str:
        """The outcome in words."""
        compiled = sum(e.resources is not None for e in self.entries)
        parts = [f"{len(self.entries)} kernels by architecture, {compiled} with their resources"]
        parts += [f"{len(self.of(level))} {level}" for level in ("worse", "stale", "better")]
        parts[0] += f", {len(self.traffic)} launches counted" if self.traffic else ""
        return ", ".join(parts) + "".join(f"; {note}" for note in self.notes)

    def rows(self) -> list[dict[str, Any]]:
        """A row a kernel and architecture, with what the launch must move and the least time for it."""
        return [
            _row(e, self.launches.get(e.case), self.efficiency.get(e.key))
            for e in self.entries
            if e.resources is not None
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rows": self.rows(),
            "traffic": self.traffic,
            "findings": [vars(f) for f in self.findings],
            "notes": self.notes,
            "summary": self.sentence(),
        }


def gather(
    families: Sequence[str] = (),
    *,
    archs: Sequence[int] = (),
    only: Sequence[str] = (),
    fresh: bool = False,
    quick: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Look at the kernels.

    Args:
        families: of Triton kernels, or "cuda" for the CUDA library. Default: all.
        archs: compute capabilities. Default: all.
        only: parts of names; kernels that contain none of them are left out.
        fresh: compile also what the budget knows by its fingerprint.
        quick: compare fingerprints, and compile one launch of each family for sm_90. Of the CUDA library, what is new is looked
            at in any case.
        say: takes a line for each kernel that is compiled.

    Raises:
        InputError: no such family or architecture, or nothing of that name.
    """
    names = [*aot.families(), CUDA]
    for name in families:
        if name not in names:
            raise InputError(f"family: expected one of {', '.join(names)}, got {name!r}")
    for arch in archs:
        if arch not in ARCHITECTURES:
            raise InputError(f"--arch: expected one of {', '.join(map(str, ARCHITECTURES))}, got {arch}")
    table = Table()
    for name in families or names:
        if name == CUDA:
            _cuda(table, archs, only, fresh=fresh)
        else:
            _triton(table, name, archs or ARCHITECTURES, only, fresh=fresh, quick=quick, say=say, whole=not archs)
    interpreted = [name for name in families or names if name != CUDA]
    if interpreted and not only and not archs:
        _traffic(table, interpreted)
    if only and not table.entries:
        raise InputError(f"--only: expected a part of a kernel's name, got {only[0]!r}")
    table.findings.sort(key=lambda f: ("worse", "stale", "better").index(f.level))
    return table


def _traffic(table: Table, families: Sequence[str]) -> None:
    try:
        table.traffic = traffic.in_a_process(families)
    except RuntimeError as error:  # an interpreter that does not go with this numpy, say
        table.notes.append(str(error))
        return
    old = budget.load_traffic()
    table.findings += budget.compare_traffic(table.traffic, old)
    now = {row["launch"] for row in table.traffic}
    left = [name for name, row in old.items() if row["family"] in families and name not in now]
    table.findings += [Finding(name, "has traffic in the budget and is there no more", "stale") for name in left]


def _triton(
    table: Table,
    family: str,
    archs: Iterable[int],
    only: Sequence[str],
    *,
    fresh: bool,
    quick: bool,
    say: Callable[[str], None],
    whole: bool,
) -> None:
    old = budget.load(family)
    table.launches |= {launch.id: launch for launch in aot.launches(family)}

    def wanted(launch: Launch, arch: int) -> bool:
        return not only or any(text in launch.id for text in only)

    known = {} if fresh else budget.by_fingerprint(old)
    # In a quick look nothing is compiled here, and nothing taken from the budget: only what is asked for is compared.
    found = list(aot.triton_entries(family, archs=archs, wanted=wanted, known=known, only_fingerprints=quick, say=say))
    compiler = found[0].compiler if found else ""
    comparable = not old or not found or budget.made_by(old) == compiler
    if not comparable:
        table.notes.append(f"{family}: the budget is of {budget.made_by(old)} and is not compared with {compiler}")
    looked_at = found
    if quick:
        chosen = _representative(family).id
        looked_at = list(
            aot.triton_entries(family, archs=(90,), wanted=lambda launch, arch: launch.id == chosen, say=say)
        )
        if comparable:
            table.findings += budget.compare([replace(e, resources=None) for e in found], old)
    if comparable:
        table.findings += budget.compare(looked_at, old)
    table.findings += budget.absolute(looked_at)
    if whole and not only:
        table.findings += budget.gone(found, old) if comparable else []
        table.whole.append(family)
    table.entries += found


def _representative(family: str) -> Launch:
    """The launch with the most work among the backward ones in bfloat16, as far as there are such."""
    return max(
        aot.launches(family),
        key=lambda launch: (
            launch.passes == "backward",
            launch.dtype == "bfloat16",
            not launch.variant,
            launch.work(launch.shape, launch.dtype).bytes_moved,
        ),
    )


def _cuda(table: Table, archs: Sequence[int], only: Sequence[str], *, fresh: bool) -> None:
    old = {
        key: entry
        for path in sorted(budget.FOLDER.glob("cuda-*.jsonl"))
        for key, entry in budget.load(path.stem).items()
    }
    try:
        found = aot_cuda.cuda_entries({} if fresh else budget.by_fingerprint(old))
    except BackendUnavailable as error:
        table.notes.append(str(error))
        return
    now, made = found[0].compiler, budget.made_by(old)
    comparable = not old or made == now
    table.efficiency = aot_cuda.cuda_flop_efficiency(found)
    whole = not archs and not only
    if not comparable:
        table.notes.append(f"cuda: the budget is of {made} and is not compared with {now}")
    else:
        table.findings += budget.compare(found, old) + (budget.gone(found, old) if whole else [])
    table.findings += budget.absolute(found)
    if whole:
        table.whole += sorted({e.family for e in found})
    table.entries += [
        e for e in found if (not archs or int(e.arch) in archs) and (not only or any(t in e.key for t in only))
    ]


def _row(entry: Entry, launch: Launch | None, of_heads: dict[int, float] | None) -> dict[str, Any]:
    r = entry.resources
    assert r is not None
    row: dict[str, Any] = {
        "family": entry.family,
        "case": entry.case,
        "kernel": entry.kernel,
        "arch": f"sm_{entry.arch}",
        **r,
        "threads": entry.threads or None,
        "blocks_per_sm": entry.blocks_per_sm or None,
        "wide_share": entry.wide_share,
    }
    if launch is not None:
        work = launch.work(launch.shape, launch.dtype)
        row |= {"grid": entry.grid, "bytes_moved": work.bytes_moved, "flops": work.flops}
        row |= {"matmul_flops": work.matmul_flops or None, **_roof(entry.arch, launch.dtype, work)}
        if work.issued_flops:
            row["flop_efficiency"] = work.matmul_flops / work.issued_flops
    if of_heads is not None:
        row["flop_efficiency_by_head"] = of_heads
    return row


def _roof(arch: str, dtype: str, work: Work) -> dict[str, Any]:
    """The least time of the whole launch by published peaks: its bytes or its products, whichever takes longer."""
    device = find_device(aot.DEVICES[arch])
    peak = find_peak(aot.DEVICES[arch], dtype)
    if device is None or device.bandwidth is None or (work.matmul_flops and peak is None):
        return {"roof_device": aot.DEVICES[arch], "roof_us": None}
    compute = work.matmul_flops / peak.flops if peak else 0.0
    return {"roof_device": device.name, "roof_us": 1e6 * max(work.bytes_moved / device.bandwidth, compute)}
