"""The benchmark's report: numbers derived from rows, files that are whole at any moment, and the comparison."""

import json

import pytest

from jaxwan.bench.report import Report, Row, compare, read_report


def report(**rows):
    return Report(
        {"runs": 3}, {"device": "NVIDIA H200"}, [Row(name, "ok", "", seconds) for name, seconds in rows.items()]
    )


def test_rates_and_shares_follow_from_the_median():
    row = Row("dit", "ok", "", [9.0, 30.0, 10.0], tflop=6523.4, ceiling=790.0, peak=989.0)
    assert row.median == 10.0 and row.rate == pytest.approx(652.34)
    assert row.cells()[:9] == ["dit", "10", "9 – 30", "3", "", "6,523", "652.3", "83%", "66%"]


def test_a_row_without_times_says_why():
    row = Row("attention", "failed", "no | cuDNN\nhere")
    assert row.median is None and row.rate is None
    assert row.cells()[-1] == "failed: no / cuDNN here" and set(row.cells()[1:-1]) == {""}


def test_a_report_is_read_as_it_was_written(tmp_path):
    written = report(dit=[1.0, 2.0])
    written.replace("dit", [*written.rows, Row("vae")])
    written.write(tmp_path / "new")
    assert read_report(tmp_path / "new" / "report.json") == written
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]
    data = json.loads((tmp_path / "new" / "report.json").read_text())
    assert data["rows"][0]["median"] == 1.5
    text = (tmp_path / "new" / "report.md").read_text()
    assert "| device | NVIDIA H200 |" in text and "pending: not measured" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "environment": {}, "rows": [{"nam": 1}]}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ValueError, match="is no benchmark report"):
        read_report(tmp_path / "old.json")


def test_a_comparison_shows_what_both_measured_and_what_changed_around_it():
    new, old = report(dit=[1.0], vae=[1.0]), report(dit=[2.5], text=[1.0])
    new.environment["jax"] = "2"
    old.environment["jax"] = "1"
    text = compare(new, old)
    assert "| dit | 2.5 | 1 | 2.500 |" in text and "vae" not in text and "text" not in text
    assert text.endswith("\njax: was 1, is 2\n")
