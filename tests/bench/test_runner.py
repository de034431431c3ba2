"""The runner on tiny cases: every suite gives complete rows, wrong candidates are not timed, noise is refused or said.

The compiler is replaced by the function itself here: what is tested is the order of things, and a compile takes seconds.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ditscale.bench import ceilings, devices, fits, models, operators, runner, subjects, timing
from ditscale.bench.cases import Case, Work, block_case, cases, step_case
from ditscale.bench.plain_dit import PlainDiT
from ditscale.bench.rows import REQUIRED, STATUSES
from ditscale.bench.runner import Session
from ditscale.bench.timing import TINY, MachineTooNoisy, Timing, measure
from ditscale.dit.config import DiTConfig
from ditscale.dit.flops import count_params


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (models, operators):
        monkeypatch.setattr(module, "fresh_compile", lambda function, **_: function)


@pytest.fixture(scope="module")
def session() -> Session:
    found = Session("cpu", TINY, tiny=True, say=lambda line: None)
    rows = found.start()
    assert {row["op"] for row in rows} == {"copy", "matmul"}
    return found


@pytest.mark.parametrize("emulated", [True, False])
def test_emulated_products_are_nobodys_ceiling(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(n: int, dtype: torch.dtype, device: str) -> Callable[[int], None]:
        return lambda place: time.sleep(0.01 if emulated and dtype == torch.bfloat16 else 0.001)

    monkeypatch.setattr(ceilings, "matmul_call", product)
    found = ceilings.measure_ceilings("cpu", TINY, tiny=True)
    assert {c["dtype"] for c in found} == ({"float32"} if emulated else {"float32", "bfloat16"})
    milliseconds, bound = ceilings.Roof(found).ms([Work(10**9, 10**9, 1)], "bfloat16")
    assert milliseconds > 0 and bound == "compute"


# A case of each kind of candidate: an operator with and without a backend of ours, a backward pass alone, the models.
KINDS = [
    next(c for c in cases("adaln", "cpu", tiny=True) if c.op == "gate_residual_layernorm_modulate"),
    next(c for c in cases("adaln", "cpu", tiny=True) if c.passes == "backward"),
    next(c for c in cases("attention", "cpu", tiny=True) if (c.op, c.passes) == ("qk_norm_rope", "backward")),
    next(c for c in cases("attention", "cpu", tiny=True) if (c.op, c.passes) == ("attention", "forward_backward")),
    block_case(2, 4, 16, 2, label="tiny"),
    step_case(2, 4, 16, 2, 2, label="tiny"),
]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
def test_rows_of_a_case_are_complete(session: Session, case: Case) -> None:
    rows = {row["provider"]: row for row in session.case(case)}
    assert {"eager", "compile"} <= rows.keys()
    for row in rows.values():
        assert row.keys() >= set(REQUIRED)
        assert row["status"] in STATUSES
        assert row["case"] == case.id
        json.dumps(row)
    eager = rows["eager"]
    assert eager["status"] == "measured"
    assert eager["time_ms_p20"] <= eager["time_ms"] <= eager["time_ms_p80"]
    assert eager["roof_share"] > 0
    assert eager["error"] == eager["plain_error"]
    wrong = {p: r["reason"] for p, r in rows.items() if r["status"] in ("wrong", "failed")}
    assert wrong == {}
    assert set(rows["compile"]["speedup_over"]) == {"eager", "copy"} if case.suite == "adaln" else {"eager"}


def test_a_copy_beside_the_case_is_the_roof_where_it_is_faster(session: Session) -> None:
    case = replace(KINDS[0], cache="rotating")
    assert session.roof is not None
    kept = session.roof.bandwidth
    try:
        session.roof.bandwidth = 1.0  # bytes/s
        rows = {row["provider"]: row for row in session.case(case)}
        assert rows["eager"]["roof_ms"] == pytest.approx(rows["copy"]["time_ms"])
        session.roof.bandwidth = 1e15
        rows = {row["provider"]: row for row in session.case(case)}
        assert rows["eager"]["roof_ms"] < rows["copy"]["time_ms"] / 10
    finally:
        session.roof.bandwidth = kept


def test_step_rows_have_the_models_utilisation(session: Session) -> None:
    row = next(r for r in session.case(KINDS[-1]) if r["provider"] == "ours")
    assert row["mfu"] > 0
    assert row["images_per_second"] > 0
    assert "measured matrix product" in row["mfu_peak_source"]


def test_a_wrong_candidate_is_reported_and_not_timed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    right = operators.kernels.gate_residual
    right(torch.zeros(1, 4, 32), torch.zeros(1, 4, 32), torch.zeros(1, 32))  # its self-check, before it is wrong
    monkeypatch.setattr(
        operators.kernels,
        "gate_residual",
        lambda *a, backend="auto": right(*a, backend=backend) * (1 + 1e-3 * (backend == "cpu")),
    )
    case = next(c for c in cases("adaln", "cpu", tiny=True) if c.op == "gate_residual")
    rows = {row["provider"]: row for row in session.case(case)}
    if rows["ours-cpu"]["status"] == "unavailable":
        pytest.skip(rows["ours-cpu"]["reason"])
    assert rows["ours-cpu"]["status"] == "wrong"
    assert "against float64" in rows["ours-cpu"]["reason"]
    assert "time_ms" not in rows["ours-cpu"]
    assert rows["eager"]["status"] == "measured"


def test_a_peer_that_raises_costs_no_other_its_row(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **_: object) -> object:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(operators, "fresh_compile", broken)
    rows = {row["provider"]: row for row in session.case(KINDS[0])}
    assert (rows["compile"]["status"], rows["compile"]["reason"]) == (
        "failed",
        "RuntimeError: no compiler here",
    )
    assert rows["eager"]["status"] == "measured"


def test_a_case_that_cannot_be_timed_costs_no_other_its_row(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> object:
        raise torch.OutOfMemoryError("no memory left\nfor copies")

    monkeypatch.setattr(ceilings, "copy_call", full)
    (row,) = session.case(KINDS[0])
    assert (row["provider"], row["status"]) == ("all", "failed")
    assert row["reason"] == "OutOfMemoryError: no memory left for copies"


def test_ceilings_leave_the_default_generator_alone() -> None:
    # On a GPU it gives no numbers any more once a capture has failed.
    before = torch.get_rng_state()
    ceilings.copy_call(1 << 10, 2, "cpu")(0)
    ceilings.matmul_call(8, torch.float32, "cpu")(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_after_the_deadline_cases_are_skipped_and_say_so(session: Session) -> None:
    late = replace(session, deadline=time.monotonic() - 1)
    (row,) = late.case(KINDS[0])
    assert (row["status"], row["reason"]) == ("skipped", "the time was up")


def test_a_compiled_function_that_keeps_its_graph_goes_backward_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch refuses the second pass in any backend; the eager one compiles nothing, which takes seconds.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    function = subjects.fresh_compile(operators.PLAIN["attention"], keeps_graph=True)
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    (once,) = torch.autograd.grad(function(q, q, q).sum(), q)  # as for the check, before calls are timed
    out = function(q, q, q).sum()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(out, q, retain_graph=True)[0], once)


def test_against_leaves_other_peers_out(session: Session) -> None:
    few = replace(session, against=("compile",))
    providers = {row["provider"] for row in few.case(KINDS[0])}
    assert "reference" not in providers
    assert {"eager", "compile", "copy"} <= providers


def test_a_peer_that_nobody_knows_is_said_with_those_that_are(session: Session) -> None:
    rows = {row["provider"]: row for row in replace(session, against=("aper",)).case(KINDS[0])}
    assert rows["aper"]["status"] == "unavailable"
    assert re.fullmatch(r"--against: expected one of .*compile.*, got 'aper'", rows["aper"]["reason"])


def test_noise_is_refused_unless_allowed_and_then_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_calibration_spread", lambda device, protocol: 0.4)
    strict = replace(TINY, noise_limit=0.1, refuse=True)
    with pytest.raises(MachineTooNoisy):
        Session("cpu", strict, tiny=True).start()
    rows = Session("cpu", strict, allow_noise=True, tiny=True).start()
    assert {row["noise"] for row in rows} == {0.4}


def test_a_disturbed_case_is_tried_again_at_the_end(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def case(self: Session, case: Case) -> list[dict[str, str]]:
        tried.append(case.op)
        calm = case.op != "gate_residual" or tried.count(case.op) == 2
        return [{"case": case.op, "status": "measured" if calm else "noisy"}]

    monkeypatch.setattr(Session, "case", case)
    some = [c for c in cases("adaln", "cpu", tiny=True) if c.passes == "forward"][:3]
    rows = list(session.suite("adaln", only=some))
    assert [r["case"] for r in rows] == [some[0].op, some[2].op, "gate_residual"]
    assert {r["status"] for r in rows} == {"measured"}


def test_the_plain_dit_has_the_released_models_names_and_size() -> None:
    config = DiTConfig.from_dict({**DiTConfig.preset("DiT-S/2").to_dict(), "learn_sigma": False})
    with torch.device("meta"):
        model = PlainDiT(side=32, channels=4, patch=2, width=384, depth=12, heads=6, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == count_params(config).total
    assert "blocks.11.adaLN_modulation.1.weight" in model.state_dict()


def test_other_counts_and_fits_agree_before_they_are_timed(session: Session) -> None:
    counts = list(session.suite("flops"))
    assert counts and all(row["agrees"] for row in counts)
    fits = list(session.suite("fit"))
    assert {row["op"] for row in fits} == {"surface", "starts", "bootstrap"}
    ours = [row for row in fits if row["provider"] == "ours"]
    assert all(row["converged"] and row["above_best"] < 1e-8 for row in ours)  # never above what scipy reaches


def test_counts_and_fits_are_left_out_where_the_time_is_up(session: Session) -> None:
    late = replace(session, deadline=time.monotonic() - 1)
    for suite in ("flops", "fit"):
        rows = list(late.suite(suite))
        assert rows and {(row["status"], row["reason"]) for row in rows} == {("skipped", "the time was up")}


@pytest.mark.parametrize("in_time", [True, False])
def test_a_slow_peer_of_the_fits_is_left_out_where_its_turn_comes_too_late(
    session: Session, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    late = replace(session, deadline=float("inf"))
    seen = []

    def measured(ways, **given):  # type: ignore[no-untyped-def]
        late.deadline = float("inf") if in_time else 0.0
        seen.extend(ways)
        return measure(ways, **given)

    monkeypatch.setattr(fits, "measure", measured)
    rows = {
        r["provider"]: r for r in fits._one(late, "starts/40", "made up", *fits._many_starts(fits.made_up_table(40), 2))
    }
    assert seen == ["ours"] and rows["ours"]["status"] == "measured"
    assert rows["scipy"]["status"] == ("measured" if in_time else "skipped")
    if in_time:
        ratio = rows["ours"]["speedup_over"]["scipy"]
        assert set(ratio.values()) == {rows["scipy"]["time_ms"] / rows["ours"]["time_ms"]}


def test_the_spread_of_a_row_is_from_the_fifth_to_the_four_fifths_of_its_samples() -> None:
    row = runner._times(Timing((1.0, 2.0, 3.0, 4.0, 10.0), 1))
    assert (row["time_ms_p20"], row["time_ms_p80"]) == (pytest.approx(1.8), pytest.approx(5.2))


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active", None])
def test_a_gpu_s_state_is_told_by_drivers_of_any_age(monkeypatch, known):
    """One that does not know a name answers nothing at all."""

    def answer(query):
        names = query.split(",")
        reasons = [name for name in names if "reasons" in name]
        return None if reasons not in ([], [known]) else ", ".join(f"<{name}>" for name in names)

    monkeypatch.setattr(devices, "_nvidia_smi", answer)
    told = devices.state("cuda")
    assert told["clocks.sm"] == "<clocks.sm>" and told["power.draw"] == "<power.draw>"
    assert [name for name in told if "reasons" in name] == ([] if known is None else [known])
