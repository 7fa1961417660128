"""The smoke run: its layouts agree in float64, and it names a layout that differs and a run that fails."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

import smoke  # noqa: E402
from smoke_layouts import all_chains, all_layouts  # noqa: E402

STEPS = [
    dict(loss=8.3, grad_norm=1.5, gradients={"layers.0.w": [(0.5, 0.3), (0.5, 0.3)], "norm.weight": [(0.01, 0.0)]}),
    dict(loss=8.2, grad_norm=1.4, gradients={"layers.0.w": [(0.4, 0.3), (0.4, 0.3)], "norm.weight": [(0.02, 0.0)]}),
]


def command(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Runs `smoke.py ARGUMENTS`: its exit status, the lines of stdout, the lines of stderr."""
    program = [sys.executable, str(ROOT / "scripts" / "smoke.py"), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_smoke_run_on_two_ranks_equals_one_process(tmp_path):
    """In float64 a layout equals one process to 1e-9, and so does a run that resumes in two other layouts."""
    patterns = ("moe: tp 2, ep 2", "dense: fsdp 2, then *")
    status, lines, errors = command("2", "--cpu", "--dtype", "float64", "--folder", str(tmp_path), "--only", *patterns)
    assert status == 0, (lines, errors)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["layout"].split(",")[0] for row in results["layouts"]] == [
        "dense: alone", "moe: alone", "moe: tp 2", "dense: fsdp 2",
    ]  # fmt: skip
    assert len(lines) == 2 + len(results["layouts"])
    for row in results["layouts"]:
        assert len(row["steps"]) == smoke.STEPS and not row["wrong"]
        assert row["layout"].endswith("alone") or 0 < max(d for d, _ in row["differences"].values()) < 1e-9
    assert len(results["layouts"][2]["steps"][0]["gradients"]["norm.weight"]) == 2  # the values of both ranks


@pytest.mark.parametrize("model", ("dense", "moe"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "float64"))
def test_difference_is_named_with_its_place(model, dtype):
    """Each of these gives a verdict with its place, in every dtype: a parameter's gradient that is doubled, also on one
    rank alone, that points elsewhere, diverges or is missing; a wrong grad norm or loss; a loss of NaN."""
    tolerance = smoke.TOLERANCE[model, dtype]
    assert smoke.verdict(smoke.differences(STEPS, STEPS), tolerance) == ""
    for change, expected in (
        (lambda steps: steps[0]["gradients"].update({"norm.weight": [(0.02, 0.0)]}), "norm.weight, step 1"),
        (lambda steps: steps[0]["gradients"].update({"layers.0.w": [(0.5, 0.3), (1.0, 0.6)]}), "layers.0.w, step 1"),
        (lambda steps: steps[0]["gradients"].update({"layers.0.w": [(0.5, -0.3)]}), "layers.0.w, step 1"),
        (lambda steps: steps[1]["gradients"].update({"layers.0.w": [(0.4, 0.3), (1.6, 1.2)]}), "layers.0.w, step 2"),
        (lambda steps: steps[1]["gradients"].pop("norm.weight"), "norm.weight, step 2"),
        (lambda steps: steps[1].update(grad_norm=1.4 * 1.05), "grad_norm by 5.0e-02"),
        (lambda steps: steps[1].update(loss=8.2 * 1.001), "loss by 1.0e-03"),
        (lambda steps: steps[0].update(loss=None), "loss by inf"),
    ):
        steps = deepcopy(STEPS)
        change(steps)
        assert expected in smoke.verdict(smoke.differences(steps, STEPS), tolerance)


def test_smoke_run_fails_if_one_layout_differs(tmp_path, monkeypatch):
    """The other layouts still run, and the error names the layout and the quantity that differs."""
    seen = []

    def wrong_with_dualpipe(name, ranks, arguments, folder):
        seen.append(name)
        steps = deepcopy(STEPS)
        if "DualPipeV" in name:
            steps[0]["gradients"]["norm.weight"] = [(0.02, 0.0)]
        return steps

    monkeypatch.setattr(smoke, "run", wrong_with_dualpipe)
    monkeypatch.setattr(smoke, "V_SCHEDULES", ())  # also before torch 2.12
    message = r"^1 of 8 runs differ .*: dense: pp 2, fsdp 4, DualPipeV: gradients, step 1 by"
    with patch.dict(os.environ), pytest.raises(ValueError, match=message):
        smoke.main(["8", "--cpu", "--folder", str(tmp_path), "--only", "*: pp*"])
    assert len(seen) == 8


def test_failed_run_ends_the_smoke_run_in_one_line(tmp_path):
    """The line has the layout's name and the error of the run. A pattern that matches no layout is one line too."""
    with pytest.raises(ValueError, match=r"^dense: cp 2 failed: .*expected at least 1"):
        smoke.run("dense: cp 2", 2, ["--job.device=cpu", "--parallelism.context_parallel_degree=0"], tmp_path)
    status, _, errors = command("2", "--only", "dens")
    assert (
        status == 1 and len(errors) == 1 and errors[0].startswith("error: no layout matches dens; there are: dense: ")
    )


def test_layouts_fit_any_number_of_ranks():
    """There are twenty layouts on 8, 4 and 2 ranks, five on one rank; all are different and use all ranks."""
    for ranks, expected in ((8, 20), (4, 20), (2, 20), (1, 5)):
        layouts = all_layouts(ranks)
        assert len(layouts) == expected == len(set(layouts))
        assert {made.ranks for chain in (layouts, *all_chains(ranks)) for made in chain} == {ranks}
