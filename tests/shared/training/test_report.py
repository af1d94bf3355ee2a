"""report.html of a training run."""

from html.parser import HTMLParser

from shared.training.report import render

FACTS = {"family": "llama", "parameters": 8_200_000, "dtype": "float32"}
ROWS = [
    {"step": 0, "validation_loss": 9.0, "bits_per_byte": 3.5},
    {
        "step": 1,
        "loss": 8.5,
        "learning_rate": 1e-4,
        "gradient_norm": 2.0,
        "tokens": 512,
        "tokens_per_second": 9000.0,
        "memory_bytes": 2 << 30,
    },
    {
        "step": 2,
        "loss": 7.5,
        "learning_rate": 2e-4,
        "gradient_norm": 1.0,
        "tokens": 1024,
        "tokens_per_second": 9100.0,
        "memory_bytes": 3 << 30,
    },
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


def page(rows, device="1 x CPU") -> Page:
    parsed = Page()
    parsed.feed(render(rows, FACTS, title="a run", device=device))
    return parsed


def test_every_curve_and_the_last_values_are_there_and_nothing_is_fetched():
    parsed = page(ROWS)
    text = " ".join(parsed.text)
    # loss, bits per byte, rate, gradient norm, throughput, memory; no MFU known
    assert parsed.tags.count("svg") == 6
    assert {"script", "link", "img"}.isdisjoint(parsed.tags)
    assert not parsed.links
    for shown in ("8.2 M parameters", "7.5", "7.7", "3.1", "9.1 k", "3 GiB", "on 1 x CPU", "no MFU: the peak"):
        assert shown in text


def test_what_is_known_of_a_gpu_and_of_experts_is_drawn():
    names = ("moe_load_imbalance", "moe_load_balancing_loss")
    rows = [{"step": step, "loss": 2.0, "mfu": 0.41, names[0]: 1.5, names[1]: 0.02} for step in (1, 2)]
    parsed = page(rows, device="8 x NVIDIA H100 80GB HBM3")
    text = " ".join(parsed.text)
    assert parsed.tags.count("svg") == 4
    for shown in ("8 x NVIDIA H100 80GB HBM3", "0.41", "MoE load imbalance", "MoE load balancing loss", "1.5"):
        assert shown in text
    assert "no MFU" not in text


def test_a_run_of_lora_says_so():
    assert "LoRA of rank 16" in render(ROWS, FACTS | {"adapter": {"rank": 16}}, title="a run", device="1 x CPU")
    assert "LoRA" not in render(ROWS, FACTS, title="a run", device="1 x CPU")


def test_without_rows_there_is_a_page():
    assert page([]).tags.count("svg") == 0
