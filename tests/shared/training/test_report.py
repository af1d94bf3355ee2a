"""report.html of a training run."""

from html.parser import HTMLParser

from shared.training.report import render

FACTS = {"family": "llama", "parameters": 8_200_000, "dtype": "float32"}
ROWS = [
    {"step": 0, "validation_loss": 9.0, "bits_per_byte": 3.5},
    {"step": 1, "loss": 8.5, "learning_rate": 1e-4, "gradient_norm": 2.0, "tokens": 512, "tokens_per_second": 9000.0},
    {"step": 2, "loss": 7.5, "learning_rate": 2e-4, "gradient_norm": 1.0, "tokens": 1024, "tokens_per_second": 9100.0},
    {"step": 2, "validation_loss": 7.7, "bits_per_byte": 3.1},
]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def page(rows) -> Page:
    parsed = Page()
    parsed.feed(render(rows, FACTS, title="a run"))
    return parsed


def test_every_curve_and_the_last_values_are_there_and_nothing_is_fetched():
    parsed = page(ROWS)
    text = " ".join(parsed.text)
    assert parsed.tags.count("svg") == 5  # loss, bits per byte, rate, gradient norm, throughput; no MFU known
    assert {"script", "link", "img"}.isdisjoint(parsed.tags)
    assert not parsed.links
    for shown in ("8.2 M parameters", "7.5", "7.7", "3.1", "9.1 k"):
        assert shown in text


def test_without_rows_there_is_a_page():
    assert page([]).tags.count("svg") == 0
