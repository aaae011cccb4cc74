"""The benchmark's table and JSON on the smallest networks."""

import json

import pytest

from jaxstyle import bench


@pytest.mark.slow
def test_cases_run(monkeypatch, capsys):
    monkeypatch.setattr(bench, "run_case", bench.measure)
    bench.main("--sizes 8 --batches 1 --repeats 1 --json --no-cache".split())
    results = json.loads(capsys.readouterr().out)
    assert [r["what"] for r in results] == ["forward", "jojo"]
    for result in results:
        assert set(bench.COLUMNS) <= set(result)
        assert result["peak_mb"] > 0 and result["median_s"] > 0


@pytest.mark.parametrize("args", ["--sizes 7", "--batches 0", "--repeats 0"])
def test_refusals(args, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(args.split())
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error:")
