"""The committed budget of every kernel, and what may not get worse: local and shared memory, bytes and width of accesses, tensor
cores, and how many threads a multiprocessor holds. One file a family under ``bench/budgets``, one line for equal kernels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditscale.bench.aot import Entry

FOLDER = Path(__file__).resolve().parent / "budgets"
# At the few rows that are interpreted, partial sums are a fifth of the compulsory bytes; at the rows of a model a few hundredths.
TRAFFIC_LIMIT = 1.3
_TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Finding:
    """What a comparison found.

    Attributes:
        key: the kernel (see :attr:`Entry.key`).
        text: in one line, with the budget's number.
        level: "worse", "stale" (the budget is of other kernels: bring it up to date) or "better".
    """

    key: str
    text: str
    level: str = "worse"


def load(family: str, folder: Path = FOLDER) -> dict[str, Entry]:
    """The budget of a family, by key; empty where none is committed."""
    path = folder / f"{family}.jsonl"
    found: dict[str, Entry] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        content = json.loads(line)
        for case in content.pop("cases"):
            entry = Entry.from_json(content | {"case": case})
            found[entry.key] = entry
    return found


def save(family: str, entries: Iterable[Entry], folder: Path = FOLDER) -> Path:
    """Write the budget of a family; equal entries give equal files."""
    lines: dict[str, list[str]] = {}
    for entry in sorted(entries, key=lambda e: (e.kernel, int(e.arch), e.case)):
        content = entry.to_json()
        case = content.pop("case")
        del content["grid"]  # of the launch, not of the kernel
        lines.setdefault(json.dumps(content), []).append(case)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family}.jsonl"
    path.write_text("".join(json.dumps({"cases": cases} | json.loads(line)) + "\n" for line, cases in lines.items()))
    return path


def by_fingerprint(budget: dict[str, Entry]) -> dict[str, Entry]:
    """Entries whose resources hold for whatever has the same fingerprint."""
    return {entry.fingerprint: entry for entry in budget.values()}


def load_traffic(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The budget of what launches read and write, by launch; empty where none is committed."""
    path = folder / "traffic.json"
    return {row["launch"]: row for row in json.loads(path.read_text())} if path.is_file() else {}


def save_traffic(rows: Iterable[dict[str, Any]], folder: Path = FOLDER) -> Path:
    """Write it, a line a launch."""
    path = folder / "traffic.json"
    lines = (json.dumps(row) for row in sorted(rows, key=lambda row: (row["family"], row["launch"])))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return path


def compare_traffic(rows: Iterable[dict[str, Any]], budget: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Launches beside their budget and beside their own ``cost.py``."""
    for row in rows:
        name, least = row["launch"], row["bytes_moved"]
        if row["touched"] > TRAFFIC_LIMIT * least:
            yield Finding(
                name, f"touches {row['touched']} bytes, more than {TRAFFIC_LIMIT} times the {least} of cost.py"
            )
        if row["touched"] < least:
            yield Finding(
                name, f"touches {row['touched']} bytes, fewer than the {least} that cost.py says it must move"
            )
        old = budget.get(name)
        if old is None:
            yield Finding(name, "has no traffic in the budget", "stale")
            continue
        for key in ("asked", "touched"):
            if row[key] > old[key]:
                yield Finding(name, f"bytes {key}: {row[key]}, budget {old[key]}")
            elif row[key] < old[key]:
                yield Finding(name, f"bytes {key}: {row[key]}, better than the budget's {old[key]}", "better")


def made_by(budget: dict[str, Entry]) -> str:
    """The compiler that a budget was made with; "" for an empty one. Another one's kernels are not compared."""
    return next(iter(budget.values())).compiler if budget else ""


def absolute(entries: Iterable[Entry]) -> list[Finding]:
    """What no kernel may do, budget or not: use local memory that its launch does not allow, or atomics."""
    found = []
    for entry in entries:
        r = _resources(entry)
        if r["stack"] > entry.stack_bytes:
            allowed = f", allowed {entry.stack_bytes}" if entry.stack_bytes else ""
            found.append(Finding(entry.key, f"uses {r['stack']} bytes of local memory a thread{allowed}"))
        atomics = sum(r["mix"].get(name, 0) for name in ("ATOM", "RED"))
        if atomics:
            found.append(Finding(entry.key, f"has {atomics} atomic instructions: sums must be in a fixed order"))
    return found


def compare(entries: Iterable[Entry], budget: dict[str, Entry]) -> list[Finding]:
    """Entries beside their budget; entries without resources are compared by fingerprint alone."""
    found = []
    for entry in entries:
        old = budget.get(entry.key)
        if old is None:
            found.append(Finding(entry.key, "is not in the budget", "stale"))
        elif entry.resources is None:
            if entry.fingerprint != old.fingerprint:
                found.append(Finding(entry.key, "is not the kernel that the budget was made from", "stale"))
        else:
            found += list(_against(entry, old))
    return found


def gone(entries: Iterable[Entry], budget: dict[str, Entry]) -> list[Finding]:
    """What the budget has and the kernels have no more."""
    now = {entry.key for entry in entries}
    return [Finding(key, "is in the budget and there no more", "stale") for key in budget if key not in now]


def _against(new: Entry, old: Entry) -> Iterator[Finding]:
    a, b = _resources(old), _resources(new)
    counts = {
        "bytes of local memory a thread": (a["stack"], b["stack"]),
        "accesses to local memory": (a["local"], b["local"]),
        "bytes of shared memory a block": (a["shared"], b["shared"]),
        "bytes a thread loads in the code": (old.accessed("loads"), new.accessed("loads")),
        "bytes a thread stores in the code": (old.accessed("stores"), new.accessed("stores")),
    }
    if new.wide_share < old.wide_share - 1e-9:
        shares = f"{100 * new.wide_share:.0f} %, budget {100 * old.wide_share:.0f} %"
        yield Finding(new.key, f"moves less in accesses of 16 bytes: {shares}")
    cores = [sum(r["mix"].get(name, 0) for name in _TENSOR_CORES) for r in (a, b)]
    if cores[0] and not cores[1]:
        yield Finding(new.key, f"uses no tensor cores, budget {cores[0]} instructions")
    for name, (before, now) in counts.items():
        if now > before:
            yield Finding(new.key, f"{name}: {now}, budget {before}")
        elif now < before:
            yield Finding(new.key, f"{name}: {now}, better than the budget's {before}", "better")
    if new.threads and old.threads and new.blocks_per_sm * new.threads < old.blocks_per_sm * old.threads:
        held = f"{new.blocks_per_sm} blocks of {new.threads}, budget {old.blocks_per_sm} of {old.threads}"
        yield Finding(new.key, f"fewer threads fit a multiprocessor: {held}")
    elif not new.threads and -(-b["registers"] // 8) > -(-a["registers"] // 8):  # they are given out in eights
        yield Finding(new.key, f"registers a thread: {b['registers']}, budget {a['registers']}")


def _resources(entry: Entry) -> dict[str, Any]:
    if entry.resources is None:
        raise ValueError(f"{entry.key} has not been compiled")
    return entry.resources
