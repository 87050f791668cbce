"""Studies: files, their expansion, statistics, fits and pages."""

import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ultramem_ds.config.load import load_config, to_dict
from ultramem_ds.model.accounting import count
from ultramem_ds.study.expand import lines, trials
from ultramem_ds.study.figures import curves_of
from ultramem_ds.study.fits import fit_line, fit_power_law
from ultramem_ds.study.paper import compute_points
from ultramem_ds.study.report import write_study
from ultramem_ds.study.results import paired_difference, read_results, standard_error
from ultramem_ds.study.run import is_finished
from ultramem_ds.study.spec import load_study, shipped

STUDY = """
title: A study
question: Which?
seeds: [0, 3]
tokens: [8192, 4096]
overrides: [train.eval_every=1]
figures: [curves, compute, subsets, state]
rows:
  - {name: dense, preset: dense-debug, paper: {valid: 2.9}}
  - name: moe
    preset: moe-debug
    grid: {optim.lr: [1e-3, 0.002], moe.drop_tokens: [true]}
    paper: {valid: 2.6}
"""


def write(tmp_path, text=STUDY):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_expansion(tmp_path):
    name, study = load_study(write(tmp_path))
    table = lines(study)
    assert name == "mine"
    assert [line.name for line in table] == [
        "dense",
        "moe,lr=1e-3,drop_tokens=true",
        "moe,lr=0.002,drop_tokens=true",
    ]
    assert [line.compare for line in table] == ["", "dense", "dense"]
    runs = trials(study, ["optim.beta2=0.9"])
    # Seeds outermost; 2,048 tokens a step.
    assert [(t.seed, t.steps, t.line.name[:5]) for t in runs[:4]] == [
        (0, 4, "dense"),
        (0, 4, "moe,l"),
        (0, 4, "moe,l"),
        (0, 2, "dense"),
    ]
    assert len(runs) == 12 and len({t.run_dir for t in runs}) == 12
    config = runs[1].config
    assert (config.optim.lr, config.moe.drop_tokens, config.train.eval_every) == (1e-3, True, 1)
    assert (config.optim.beta2, config.train.seed, config.train.max_steps) == (0.9, 0, 4)
    assert runs[0].tokens == 8192 and runs[0].training_flops > 6 * 8192 * 0.7e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("preset: dense-debug", "preset: dense-debg"), "did you mean 'dense-debug'"),
        (("train.eval_every", "train.eval_evry"), "nearest valid key is 'train.eval_every'"),
        (("seeds: [0, 3]", "seeds: [0, 0]"), "seeds must not be empty nor name one thing twice"),
        (("seeds: [0, 3]", "sedes: [0, 3]"), "sedes"),
        (("tokens: [8192, 4096]", "tokens: [100]"), "less than one step"),
        (("name: moe", "name: dense"), "'dense' is there twice"),
        (("name: moe", "name: a/b"), "a name has letters"),
        (("preset: moe-debug", "preset: moe-debug\n    compare: pkm"), "compare=pkm is no row"),
        (("title: A study", "title: ["), "not valid YAML"),
        (("question: Which?", ""), "question"),
    ],
)
def test_bad_studies_say_what_is_wrong(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trials(load_study(write(tmp_path, STUDY.replace(*change)))[1])


def test_unknown_study_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'table-1-cpu'"):
        load_study("table-1-cp")


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_expand(name):
    _, study = load_study(name)
    runs = trials(study)
    assert len({t.run_dir for t in runs}) == len(runs)
    if name.startswith("table-1"):  # equal FLOPs and sparse parameters within a size
        for size in {t.line.name.split("-", 1)[1].removeprefix("plain-") for t in runs}:
            kinds = [t for t in runs if t.line.name.endswith(size) and t.line.group != "dense"]
            sizes = [count(t.config) for t in kinds]
            flops = [s.flops_per_token for s in sizes]
            assert max(flops) < 1.06 * min(flops)
            assert max(s.sparse_params for s in sizes) < 1.2 * min(s.sparse_params for s in sizes)
    if name == "table-2-cpu":
        assert len(lines(study)) == 22
        assert runs[1].line.compare == "00-pkm" and runs[15].line.compare == "00-pkm"


def test_paired_difference_is_students():
    ours, reference = {0: 4.10, 1: 4.20, 2: 4.35, 7: 1.0}, {0: 4.15, 1: 4.22, 2: 4.46, 8: 9.0}
    found = paired_difference(ours, reference)
    oracle = scipy_stats.ttest_rel([4.10, 4.20, 4.35], [4.15, 4.22, 4.46])
    assert found.mean == pytest.approx(-0.06) and found.num_seeds == 3
    assert found.p == pytest.approx(float(oracle.pvalue), rel=1e-6)
    assert found.error == pytest.approx(abs(found.mean / float(oracle.statistic)), rel=1e-6)
    assert found.mark == ""
    one = paired_difference({0: 4.0}, {0: 4.5})
    assert one.mean == -0.5 and math.isnan(one.error) and one.mark == "?"
    assert paired_difference({0: 4.0}, {1: 4.0}) is None
    assert paired_difference({0: 1.0, 1: 1.01}, {0: 2.0, 1: 2.0}).mark == "**"
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


def test_power_law_is_recovered_and_its_band_covers():
    """Exact on exact data; on noisy data the 95% band covers the truth 95% of the time."""
    compute = [1e15, 3e15, 1e16, 4e16, 1e17]
    exact = fit_power_law(compute, [20 * c**-0.05 for c in compute])
    assert exact.slope == pytest.approx(-0.05) and math.exp(exact.intercept) == pytest.approx(20)
    generator = np.random.default_rng(0)
    x = np.array([0.0, 1.0, 2.0, 3.0])
    at = np.array([1.5])
    covered = 0
    for _ in range(400):
        fit = fit_line(x, 1 + 2 * x + generator.normal(0, 0.3, len(x)))
        covered += abs(fit.predict(at)[0] - 4.0) <= fit.half_band(at)[0]
    assert 0.92 < covered / 400 < 0.98
    assert fit_line([1.0, 1.0], [2.0, 3.0]) is None
    with pytest.raises(ValueError, match="at least three points"):
        fit_line([1.0, 2.0], [2.0, 3.0]).half_band(at)


def test_papers_points():
    """Table 1 at 1.0e12 tokens: dense-151M costs 3 * 0.30 GFLOPs a token."""
    first = compute_points("dense")[0]
    assert first[0] == pytest.approx(9.0e20, rel=0.01) and first[1] == 2.96
    assert len(compute_points("ultramem")) == 3 and compute_points("other") == []


def fake_run(output, trial, val_loss, state=()):
    """A finished run directory as `train` leaves it."""
    run_dir = output / trial.run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(to_dict(trial.config)))
    (run_dir / "summary.json").write_text(json.dumps({"step": trial.steps}))
    per_step = trial.tokens // trial.steps
    with open(run_dir / "metrics.jsonl", "w") as out:
        for step in range(1, trial.steps + 1):
            record = {"step": step, "tokens": step * per_step, "loss": val_loss + 0.1 / step}
            record |= {"grad_norm": 1.0, **{f"layer_0/{name}": 0.5 for name in state}}
            out.write(json.dumps(record) + "\n")
    with open(run_dir / "validation.jsonl", "w") as out:
        for step in range(1, trial.steps + 1):
            loss = val_loss + 0.2 * (trial.steps - step)
            out.write(json.dumps({"step": step, "docs": loss, "code": loss, "all": loss}) + "\n")


def test_page_of_unfinished_and_finished_runs(tmp_path):
    name, study = load_study(write(tmp_path))
    table, runs = lines(study), trials(study)
    output = tmp_path / "out"
    output.mkdir()
    (page,) = write_study(name, study, table, runs, output, 10_000)
    assert "0 of 12 runs are finished" in page.read_text()
    losses = {"dense": (5.0, 5.1), "moe,lr=1e-3,drop_tokens=true": (4.8, 4.91)}
    for trial in runs:
        if trial.tokens == 8192 and trial.line.name in losses:
            loss = losses[trial.line.name][trial.seed // 3]
            fake_run(output, trial, loss, state=("recall", "output_std"))
    written = write_study(name, study, table, runs, output, 10_000)
    figures = {path.name for path in written if path.suffix == ".png"}
    assert figures == {f"mine-{f}.png" for f in ("curves", "compute", "subsets", "state")}
    assert all(path.stat().st_size > 5000 for path in written if path.suffix == ".png")
    text = written[0].read_text()
    assert "4 of 12 runs are finished" in text and "nothing twice" in text
    row = next(line for line in text.splitlines() if line.startswith("| moe"))
    # Validation 4.855 ± 0.055; difference -0.2, -0.19 -> -0.195 ± 0.005, p = 1.6%.
    assert "4.8550 ± 0.0550" in row and "-0.1950 ± 0.0050 *" in row and "-0.300" in row
    values = json.loads((output / "mine.json").read_text())
    assert values["rows"][1]["difference"] == -0.195 and len(values["runs"]) == 4
    assert values["runs"][0]["validation"]["docs"][-1] == [8192, 5.0]


def test_a_curve_is_of_one_budget(tmp_path):
    """Another budget is another schedule: never averaged with the first."""
    _, study = load_study(write(tmp_path))
    dense = [trial for trial in trials(study) if trial.line.name == "dense"]
    for trial in dense:
        fake_run(tmp_path, trial, 5.0)
    groups = curves_of(read_results(dense, tmp_path))
    assert {label: len(runs) for label, runs in groups.items()} == {
        "dense, 0.01 M": 2,
        "dense, 0.00 M": 2,
    }


def test_another_run_in_the_directory_is_refused(tmp_path):
    _, study = load_study(write(tmp_path))
    first, second = trials(study)[:2]
    fake_run(tmp_path, first, 5.0)
    assert is_finished(first, tmp_path) and not is_finished(second, tmp_path)
    values = to_dict(load_config("dense-debug", [*first.overrides, "optim.lr=0.5"]))
    (tmp_path / first.run_dir / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"another optim\.lr than the study's"):
        is_finished(first, tmp_path)
