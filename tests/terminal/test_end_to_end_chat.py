"""`infer chat` in tmux, as typed: several lines, paste, history, streaming, thinking, Ctrl-C, and the shell behind it.

The model is one that vLLM does not run: transformers' engine starts in seconds.
test_interrupts.py has Ctrl-C where an engine has processes of its own.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.terminal.conftest import Pane
from tests.tools.infer.tiny_models import TEMPLATE, tiny_model

TOKENS = 1500  # of a reply: seconds, so that there is something to interrupt
SYSTEM = "be brief"


def reply(source: Path, messages: list[dict[str, str]], tokens: int) -> str:
    """The first greedy tokens of transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def shown(text: str) -> str:
    """As comparable whatever the width of the screen."""
    return "".join(text.split())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "stablelm"
    tiny_model("stablelm", path, use_parallel_residual=True, max_position_embeddings=8192)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chat(pane: Pane, source: Path) -> Callable[[], None]:
    """Type the command and wait for its prompt."""

    def start() -> None:
        pane.clear()
        pane.type(f"infer chat --source {source} --system '{SYSTEM}' --max-tokens {TOKENS}")
        pane.press("Enter")
        pane.wait(lambda text: text.rstrip().endswith("/help lists commands and keys\n>"), 400)

    return start


def interrupted(pane: Pane, asked: str) -> str:
    """What has come of the reply to the message just sent, after Ctrl-C; it came in pieces."""
    seen = set()

    def grows(text: str) -> bool:
        seen.add(len(said(text)))
        return len(seen) > 4 and len(shown(said(text))) > 30

    def said(text: str) -> str:
        return text.rpartition(asked)[2].strip()

    pane.wait(grows)
    pane.press("C-c")
    text = said(pane.wait(lambda text: text.rstrip().endswith("\n>")))
    assert text.endswith("\n>")
    return text.removesuffix(">").replace("^C", "")  # the terminal's echo


def test_a_conversation_is_typed_in_tmux(pane: Pane, chat: Callable[[], None], source: Path) -> None:
    chat()
    # Alt-Enter, a letter taken back, and a backslash before Enter: one message of three lines
    pane.type("fox?")
    pane.press("M-Enter")
    pane.type("and the catt")
    pane.press("BSpace")
    pane.type(" \\")
    pane.press("Enter")
    pane.type("too?")
    pane.press("Enter")
    first = [{"role": "system", "content": SYSTEM}, user("fox?\nand the cat \ntoo?")]
    came = interrupted(pane, "too?")
    wanted = reply(source, first, 60)
    length = min(len(shown(came)), len(shown(wanted)))
    assert length > 20
    assert shown(came)[:length] == shown(wanted)[:length], "a message of other lines, or another reply"
    assert len(shown(came)) < 3 * TOKENS / 2, "Ctrl-C came after the reply"

    pane.clear()  # the conversation goes on: Ctrl-C has ended the reply alone
    pane.type("/reset")
    pane.press("Enter")
    pane.wait(lambda text: text.rstrip().endswith("new conversation\n>"))
    pane.paste("one dog\nover the fence")
    pane.wait(lambda text: text.rstrip().endswith("over the fence"))
    time.sleep(0.5)
    assert "new conversation" in pane.text().splitlines()[-1] or pane.text().rstrip().endswith("over the fence"), "sent"
    pane.press("Enter")
    came = interrupted(pane, "over the fence")
    wanted = reply(source, [first[0], user("one dog\nover the fence")], 60)
    length = min(len(shown(came)), len(shown(wanted)))
    assert length > 20
    assert shown(came)[:length] == shown(wanted)[:length]

    pane.type("never sent")  # Ctrl-C at the prompt drops what is typed
    pane.press("C-c")
    time.sleep(0.3)
    pane.type("/exit")
    pane.press("Enter")
    time.sleep(0.5)
    pane.type("echo code $?")
    pane.press("Enter")
    assert "code 0" in pane.wait(lambda text: "\ncode " in text)


def test_the_history_outlives_the_command(pane: Pane, chat: Callable[[], None]) -> None:
    chat()
    pane.clear()
    pane.press("Up", "Up")  # /exit, and the pasted message before it, both lines
    pane.wait(lambda text: "> one dog\n  over the fence" in text)
    pane.press("C-c", "C-d")
    pane.clear()
    pane.type("echo code $?")
    pane.press("Enter")
    assert "code 0" in pane.wait(lambda text: "\ncode " in text)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template opens a thought; it replies fuzzy</think>quick, since each token has one that follows it."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("model") / "thinker"
    tiny_model("stablelm", path, use_parallel_residual=True, vocab_size=160)
    (path / "chat_template.jinja").write_text("{{ messages[-1].content }}<think>", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<think>", "</think>", "fuzzy", "quick"])
    tokenizer.save_pretrained(path)
    chain = tokenizer.convert_tokens_to_ids(["<think>", "fuzzy", "</think>", "quick", "<eos>"])
    weights = load_file(path / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding.normal_(generator=torch.Generator().manual_seed(0))
    head.zero_()
    for token, following in itertools.pairwise(chain):
        head[following] = torch.nn.functional.layer_norm(embedding[token], embedding[token].shape)
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()  # a layer adds nothing: the last token alone decides
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(("flags", "shown"), [("", True), (" --thinking hidden", False)])
def test_thinking_is_dim_or_hidden(flags: str, shown: bool, pane: Pane, thinker: Path) -> None:
    pane.clear()
    pane.type(f"infer chat --source {thinker}{flags}")
    pane.press("Enter")
    pane.wait(lambda text: text.rstrip().endswith("/help lists commands and keys\n>"), 400)
    pane.clear()
    pane.type("two and two")
    pane.press("Enter")
    text = pane.wait(lambda text: "quick" in text and text.rstrip().endswith("\n>"))
    styled = pane.styled()
    assert ("fuzzy" in text) == shown
    assert bool(re.search(r"\x1b\[2m *fuzzy", styled)) == shown
    assert not re.search(r"\x1b\[2m[^\x1b]*quick", styled), "the answer is dim, too"
    assert "think>" not in text
    pane.press("C-d")
    pane.type("echo code $?")
    pane.press("Enter")
    assert "code 0" in pane.wait(lambda text: "\ncode " in text)
