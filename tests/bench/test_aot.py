"""The ahead-of-time table: kernels as they are meet the committed budget, and what is worse is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

from ditscale.bench import aot, aot_cuda, aot_table, budget, sass, traffic
from ditscale.bench.aot import Entry
from ditscale.errors import BackendUnavailable, InputError

SASS = """
        Function : a_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P4 LDG.E.128 R24, desc[UR6][R42.64] ;
        /*0020*/                   LDG.E.U16.CONSTANT R2, desc[UR6][R4.64] ;
        /*0030*/              @UP0 LDGSTS.E.BYPASS.128 [R3], desc[UR6][R4.64] ;
        /*0040*/               @P3 STG.E.64 desc[UR6][R82.64], R20 ;
        /*0050*/                   STL [R1], R2 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0070*/                   FFMA R1, R2, R3, R4 ;
        /*0080*/                   NOP ;
"""


def check(*arguments: str) -> tuple[int, dict[str, Any]]:
    """``ditscale bench aot`` in a process of its own: in this one the interpreter may have taken the compiler's place."""
    command = [sys.executable, "-P", "-m", "ditscale", "bench", "aot", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_kernels_meet_their_budget() -> None:
    code, found = check("--check")
    assert [f"{f['level']}: {f['key']} {f['text']}" for f in found["findings"] if f["level"] != "better"] == []
    assert code == 0
    assert {row["family"] for row in found["traffic"]} == set(aot.families()), found["notes"]


@pytest.mark.slow
def test_every_kernel_compiled_anew_meets_its_budget() -> None:
    code, found = check("--check", "--fresh")
    assert [f for f in found["findings"] if f["level"] != "better"] == []
    assert code == 0


def test_rows_of_cuda_kernels_are_written_in_whole_accesses() -> None:
    # The compiler took some apart, into four of 4 bytes each.
    found = {e.key: e for family in ("norm", "rotary", "rows") for e in budget.load(f"cuda-{family}").values()}.values()
    rows = [e for e in found if e.kernel == "rotary_forward" or (e.kernel == "gelu_kernel" and ", 1," not in e.case)]
    assert len({e.kernel for e in rows}) == 2
    for entry in rows:
        assert entry.resources is not None
        half = entry.case in ("bf16, 4, true", "f16, 4, true")
        assert set(entry.resources["stores"]) == {64 if half else 128}, entry.key
    for entry in found:
        if entry.kernel in ("rotary_backward", "backward_fast") and entry.resources is not None:
            whole = sum(n for bits, n in entry.resources["stores"].items() if bits >= 64)
            assert whole >= 4, entry.key


def test_instructions_are_counted() -> None:
    kernel = sass._count(sass.Kernel("a_kernel", 32, 0, 0), SASS)
    assert kernel.loads == {16: 1, 128: 2}
    assert kernel.stores == {64: 1}
    assert (kernel.local, kernel.mix["HMMA"], kernel.mix["FFMA"], kernel.mix["all"]) == (1, 1, 1, 8)


RESOURCES = {
    "registers": 40,
    "stack": 0,
    "shared": 1024,
    "loads": {128: 4},
    "stores": {128: 2},
    "local": 0,
    "bulk": 0,
    "mix": {"HMMA": 8, "all": 100},
}
ENTRY = Entry("adaln", "an_op/forward", "a_kernel", "90", "0123 triton 3.7.1", 128, 7, RESOURCES)


def levels(**changed: Any) -> list[tuple[str, str]]:
    new = replace(ENTRY, resources={**RESOURCES, **changed})
    return [(f.level, f.text) for f in budget.compare([new], {ENTRY.key: ENTRY})]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"stack": 8}, "bytes of local memory a thread: 8, budget 0"),
        ({"local": 2}, "accesses to local memory: 2, budget 0"),
        ({"loads": {128: 5}}, "bytes a thread loads in the code: 80, budget 64"),
        ({"stores": {128: 3}}, "bytes a thread stores in the code: 48, budget 32"),
        ({"loads": {64: 8}}, "moves less in accesses of 16 bytes: 33 %, budget 100 %"),
        ({"mix": {"HMMA": 0, "all": 100}}, "uses no tensor cores, budget 8 instructions"),
        ({"registers": 72}, "fewer threads fit a multiprocessor: 7 blocks of 128, budget 12 of 128"),
        ({"shared": 2048}, "bytes of shared memory a block: 2048, budget 1024"),
    ],
)
def test_what_is_worse_is_found(changed: dict[str, Any], text: str) -> None:
    assert levels(**changed) == [("worse", text)]


def test_shared_memory_that_keeps_blocks_out_is_found() -> None:
    text = "fewer threads fit a multiprocessor: 3 blocks of 128, budget 12 of 128"
    assert ("worse", text) in levels(shared=64 << 10)


def test_equal_and_better_kernels_pass() -> None:
    assert levels() == []
    assert levels(registers=32) == []
    assert [level for level, _ in levels(shared=0)] == ["better"]
    assert [level for level, _ in levels(loads={128: 3})] == ["better"]


def test_local_memory_and_atomics_are_never_right_unless_the_launch_says_so() -> None:
    spilled = replace(ENTRY, resources={**RESOURCES, "stack": 8})
    assert [f.level for f in budget.absolute([spilled])] == ["worse"]
    assert budget.absolute([replace(spilled, stack_bytes=8)]) == []
    atomic = replace(ENTRY, resources={**RESOURCES, "mix": {"RED": 1, "all": 9}})
    assert "atomic" in budget.absolute([atomic])[0].text


def test_atomics_whose_order_does_not_matter_are_no_sums() -> None:
    opcodes = ("ATOMS.OR", "REDUX.SUM", "REDG.E.ADD.F32", "ATOMG.E.ADD")
    code = "".join(f"        /*0000*/                   {opcode} R1, [R2], R3 ;\n" for opcode in opcodes)
    kernel = sass._count(sass.Kernel("a_kernel", 32, 0, 0), code)
    assert (kernel.mix["ATOM"], kernel.mix["RED"]) == (1, 1)


def test_a_changed_kernel_is_told_from_the_budgets_without_compiling() -> None:
    changed = replace(ENTRY, resources=None, fingerprint="4567 triton 3.7.1")
    assert [f.level for f in budget.compare([changed], {ENTRY.key: ENTRY})] == ["stale"]
    assert budget.compare([replace(ENTRY, resources=None)], {ENTRY.key: ENTRY}) == []
    assert [f.level for f in budget.gone([], {ENTRY.key: ENTRY})] == ["stale"]


def test_budgets_are_written_and_read_back(tmp_path: Path) -> None:
    other = replace(ENTRY, case="an_op/backward")
    budget.save("adaln", [other, ENTRY], tmp_path)
    assert len((tmp_path / "adaln.jsonl").read_text().splitlines()) == 1  # equal kernels share a line
    assert budget.load("adaln", tmp_path) == {e.key: replace(e, grid=0) for e in (other, ENTRY)}


def test_names_of_cuda_kernels() -> None:
    name = "_ZN8ditscale4cuda39_GLOBAL__N__8a2a5fea_7_norm_cu_83b5015612forward_fastIfLb1EEEvNS_11ForwardArgsEll"
    try:
        assert aot_cuda._demangled([name])[name] == ("norm", "forward_fast", "float, true")
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("arch", "told", "own"), [(80, 384, 384), (90, 1408, 384), (120, 1024, 0), (100, 0, 0)])
def test_what_the_system_takes_of_a_block_is_counted_once(arch: int, told: int, own: int) -> None:
    assert aot.static_shared(sass.Kernel("a_kernel", 32, 0, told), arch) == own
    entry = replace(ENTRY, arch=str(arch), resources={**RESOURCES, "shared": 49 << 10})
    assert entry.blocks_per_sm == aot.LIMITS[str(arch)][2] // (50 << 10)


def test_the_budget_of_cuda_attention_has_what_launches_ask_for() -> None:
    entries = budget.load("cuda-attention_f32")
    old = entries["float, 80 attention_dq sm_80"]
    assert old.resources is not None
    assert (old.resources["shared"], old.blocks_per_sm) == (86_016, 1)
    for arch in ("90", "100", "120"):
        assert entries[f"float, 80 attention_dq sm_{arch}"].resources["shared"] == 86_016  # type: ignore[index]


def test_the_library_tells_what_launches_of_every_attention_kernel_ask_for() -> None:
    try:
        asked = sass.asked_shared(aot_cuda.cuda_library())
    except BackendUnavailable as error:
        pytest.skip(str(error))
    kernels = {
        (e.kernel, e.case) for unit in ("bf16", "f16", "f32") for e in budget.load(f"cuda-attention_{unit}").values()
    }
    assert set(asked) == kernels
    assert min(asked.values()) > 16 << 10


def test_a_head_pays_for_the_columns_of_the_narrowest_kernel_that_holds_it() -> None:
    entries = [replace(ENTRY, case=case, kernel="attention_forward") for case in ("f16, 64", "f16, 72", "float, 80")]
    entries += [replace(ENTRY, case="float, 80", kernel="attention_dq"), ENTRY]
    found = aot_cuda.cuda_flop_efficiency(entries)
    assert found == {
        "f16, 64 attention_forward sm_90": {64: 1.0},
        "f16, 72 attention_forward sm_90": {72: 1.0},
        "float, 80 attention_forward sm_90": {64: 0.8, 72: 0.9, 80: 1.0},
        "float, 80 attention_dq sm_90": {K: pytest.approx(8 * K / (14 * 80)) for K in (64, 72, 80)},
    }


def test_a_filter_that_leaves_a_family_empty_says_nothing_of_its_budget() -> None:
    table = aot_table.Table()
    more: dict[str, Any] = {"fresh": False, "quick": False, "say": print, "whole": False}
    aot_table._triton(table, "rotary", (90,), ["nothing like it"], **more)
    assert (table.entries, table.notes) == ([], [])


class _Memory:
    """Takes the interpreter's place: loads give zeros."""

    def load(self, addresses: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.zeros(addresses.shape, dtype)

    def store(self, addresses: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        return None


def test_traffic_counts_each_byte_once_and_each_access_for_itself() -> None:
    counter = traffic._Counter(_Memory())
    row = np.uint64(4096) + 4 * np.arange(8, dtype=np.uint64)
    everything = np.ones(8, bool)
    counter.load(row, everything, None, np.float32)
    counter.load(np.stack([row, row]), np.stack([everything, everything]), None, np.float32)  # a tile of one row
    counter.load(row, np.arange(8) < 2, None, np.float32)
    counter.store(row, np.zeros(8, np.float16), everything)
    assert counter.asked == 32 + 32 + 8 + 16
    assert counter.touched == 32 + 16


TRAFFIC = {"launch": "an_op/forward", "asked": 140, "touched": 110, "bytes_moved": 100, "family": "adaln"}


@pytest.mark.parametrize(
    ("changed", "level", "text"),
    [
        ({"asked": 150}, "worse", "bytes asked: 150, budget 140"),
        ({"touched": 120}, "worse", "bytes touched: 120, budget 110"),
        ({"asked": 130}, "better", "bytes asked: 130, better than the budget's 140"),
        ({"bytes_moved": 80}, "worse", "touches 110 bytes, more than 1.3 times the 80 of cost.py"),
        ({"bytes_moved": 111}, "worse", "touches 110 bytes, fewer than the 111 that cost.py says it must move"),
    ],
)
def test_wider_traffic_is_found(changed: dict[str, int], level: str, text: str) -> None:
    found = list(budget.compare_traffic([TRAFFIC | changed], {"an_op/forward": TRAFFIC}))
    assert [(f.level, f.text) for f in found] == [(level, text)]


def test_traffic_without_a_budget_is_stale() -> None:
    assert [f.level for f in budget.compare_traffic([TRAFFIC], {})] == ["stale"]
    assert list(budget.compare_traffic([TRAFFIC], {"an_op/forward": TRAFFIC})) == []


def test_machine_code_is_told_apart_by_its_bytes() -> None:
    try:
        library = aot_cuda.cuda_library()
        found = sass.identities(library)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    usage = {(arch, kernel.name) for arch, kernel in sass.read(library, functions=())}
    assert set(found) == usage
    assert len({identity.digest for identity in found.values()}) > len(found) / 2
    # Every kernel of ours says what it is launched with.
    assert all(0 < identity.threads <= 1024 for identity in found.values())


def test_launches_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in aot.families():
        assert aot.launches(family)
    import ditscale.kernels.gelu.aot as gelu

    one = gelu.launches()[0]
    monkeypatch.setattr(gelu, "launches", lambda: [one, one])
    with pytest.raises(InputError, match="twice"):
        aot.launches("gelu")
    with pytest.raises(InputError, match="family: expected one of adaln"):
        aot.launches("nothing")
