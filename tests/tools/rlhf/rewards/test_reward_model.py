"""What a reward model is shown: its own tokens, as `rlhf reward` trained on them, scored at their last by plain transformers."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from shared.errors import UserError
from tools.rlhf.data import Prompt, end_token_id, read_preferences
from tools.rlhf.models import open_source
from tools.rlhf.padding import with_padding_token
from tools.rlhf.rewards.reward_model import ModelReward
from tools.rlhf.rollout.rollout import Reply

LETTERS = "abcdefghijklmnopqrstuvwxyz :"
CHAT = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
MESSAGES = [{"role": "user", "content": "ab"}]


def tokenizer(*, special=("<s>", "</s>", "<|end|>", "<unk>"), bos=False, letters=LETTERS, chat=CHAT, **named):
    vocab = {token: number for number, token in enumerate([*special, *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    names = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<|end|>"]}
    if "<unk>" in special:
        names["unk_token"] = "<unk>"
    made = PreTrainedTokenizerFast(tokenizer_object=core, **names | named)
    made.chat_template = chat
    return made


def save(path, words, rows=0, **generation):
    """A policy with `rows` spare rows in its embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words) + rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.update(**generation)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def ids_of(own, policy, prompt, reply):
    class Model:
        config = LlamaConfig(pad_token_id=0, max_position_embeddings=64)

    scorer = ModelReward("rm", Model(), own, policy, context=64, device=torch.device("cpu"), batch_size=4)
    scorer.check([prompt])
    return list(scorer._ids(prompt, reply))


def reply_of(words, text, end):
    ids = words(text, add_special_tokens=False)["input_ids"]
    return Reply(ids=(*ids, end) if end is not None else tuple(ids), text=text, ended=end is not None)


@pytest.mark.parametrize("end", ["</s>", "<|end|>", None])
@pytest.mark.parametrize("own_letters", [LETTERS, LETTERS[::-1]])
@pytest.mark.parametrize("raw", ["ab", MESSAGES])
def test_the_ids_are_those_that_the_model_was_trained_on(tmp_path, end, own_letters, raw):
    """Own vocabulary or the policy's, own BOS, own template, either end token."""
    policy = tokenizer()
    own = tokenizer(bos=True, letters=own_letters, chat="{{ bos_token }}" + CHAT)
    ids = tuple(policy("ab<|end|>" if isinstance(raw, list) else "ab")["input_ids"])
    number = None if end is None else policy.convert_tokens_to_ids(end)
    prompt = Prompt(text=policy.decode(ids), ids=ids, raw=raw)
    found = ids_of(own, policy, prompt, reply_of(policy, "cd", number))
    row = {"prompt": raw, "chosen": "cd", "rejected": "x"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    (pair,), _ = read_preferences(tmp_path / "pairs.jsonl", own, max_length=64)
    assert found == list(pair.chosen if end else pair.chosen[:-1])
    assert found.count(own.bos_token_id) == 1


def test_equal_tokenizers_take_the_sampled_ids():
    """Sampled tokens are not always those of their text."""
    policy = tokenizer()
    prompt = Prompt(text="ab", ids=(5, 6), raw="ab")
    assert ids_of(policy, policy, prompt, Reply(ids=(7, 8, 1), text="other", ended=True)) == [5, 6, 7, 8, 2]


def test_messages_without_a_template_are_refused_before_the_run():
    own, policy = tokenizer(chat=None), tokenizer()
    with pytest.raises(UserError, match="model:rm: its chat template does not render the messages"):
        ids_of(own, policy, Prompt(text="ab", ids=(5, 6), raw=MESSAGES), reply_of(policy, "c", 1))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, "</s>"),
        (CHAT, "<|end|>"),
        (
            "{% for m in messages %} {{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}",
            "</s>",
        ),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "</s>"),
        ("{{ raise_exception('no') }}", "</s>"),
    ],
)
def test_a_reply_ends_with_what_the_template_writes(template, end):
    words = tokenizer(chat=template)
    assert end_token_id(words) == words.convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    ("words", "rows", "pad"),
    [
        (tokenizer(special=("<s>", "</s>", "<|end|>", "<unk>", "<pad>"), pad_token="<pad>"), 0, "<pad>"),
        (tokenizer(special=("<s>", "</s>", "<|end|>", "<unk>", "<pad>")), 0, "<pad>"),
        (tokenizer(pad_token="</s>"), 0, "<unk>"),
        (tokenizer(pad_token="<|end|>"), 0, "<unk>"),
        (tokenizer(special=("<s>", "</s>", "<|end|>"), letters=LETTERS, pad_token="</s>"), 4, "<|pad|>"),
        (tokenizer(special=("<s>", "</s>", "<|end|>"), letters=LETTERS, pad_token="</s>"), 0, None),
    ],
)
def test_the_published_directory_scores_what_the_trainer_scored(tmp_path, rlhf, capsys, words, rows, pad):
    """Plain transformers, in a padded batch: the head at the end token, and another score without it."""
    source = save(tmp_path / "policy", words, rows)
    pairs = [
        {"prompt": "q:", "chosen": " good"[: 2 + n % 4] + "abc"[n % 3], "rejected": "xyz"[n % 3] * (1 + n % 5)}
        for n in range(24)
    ]
    data, target = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    flags = {"source": source, "data": data, "target": target, "global_batch_size": 8, "learning_rate": 1e-2}
    if pad is None:
        assert rlhf("reward", **flags) == 2
        assert "no token to pad with but '</s>'" in capsys.readouterr().err
        assert not target.exists()
        return
    assert rlhf("reward", **flags) == 0
    own = AutoTokenizer.from_pretrained(target)
    model = AutoModelForSequenceClassification.from_pretrained(target)
    assert own.pad_token == pad
    assert own.pad_token_id == model.config.pad_token_id < model.config.vocab_size
    end = own.convert_ids_to_tokens(end_token_id(own))
    texts = ["q:a" + end, "q: goodabc" + end, "q: goodabc"]
    batch = own(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
        for text, score in zip(texts, scores, strict=True):
            hidden = model.model(torch.tensor([own(text)["input_ids"]])).last_hidden_state[0]
            assert score == pytest.approx(model.score(hidden[-1]).item(), abs=1e-5)  # float32, another batch
    assert abs(scores[1] - scores[2]) > 1e-4


def test_a_padding_token_of_its_own_is_left_alone(world):
    source = open_source(world.policy)
    assert with_padding_token(source) is source
