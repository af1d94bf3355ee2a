"""report.html: one page for every kind of run."""

from shared.report.page import line_charts, render, write

ROWS = [{"step": 1, "reward": 0.25, "kl": 0.0}, {"step": 2, "reward": 0.5, "kl": 1.5}]


def test_a_chart_draws_its_metrics_and_names_their_last_values():
    reward, both = line_charts(ROWS, {"Reward": ["reward"], "Reward and KL": ["reward", "kl", "absent"]})
    assert reward.count("<polyline") == 1
    assert both.count("<polyline") == 2
    assert "<b>1.5</b>" in both
    assert line_charts(ROWS, {"Nothing": ["absent"]}) == [""]


def test_the_page_has_the_tiles_that_have_a_value_and_escapes_text():
    page = render(title="PPO <run>", tiles={"reward": "0.5", "MFU": ""}, figures=line_charts(ROWS, {"A & B": ["kl"]}))
    assert "<dt>reward</dt><dd>0.5</dd>" in page
    assert "MFU" not in page
    assert "PPO &lt;run&gt;" in page
    assert "A &amp; B" in page
    assert "<p>" not in page
    assert "<p>llama</p>" in render(title="a run", subtitle="llama", tiles={}, figures=[])


def test_the_file_is_replaced_whole(tmp_path):
    write(tmp_path / "report.html", "first")
    write(tmp_path / "report.html", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "second"
