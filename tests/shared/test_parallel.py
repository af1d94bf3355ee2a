"""Rules of ParallelConfig: alone, with a model, with batch sizes. Error messages name a valid value."""

from dataclasses import replace

import pytest

from shared.architecture.architecture import Architecture, LatentAttention, Layer, MoE
from shared.errors import UserError
from shared.families import registry
from shared.parallel import ParallelConfig


def test_data_parallelism_is_what_the_layout_leaves_over():
    parallel = ParallelConfig(processes=16, tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True, expert=4)
    assert (parallel.model_parallel, parallel.data, parallel.etp) == (4, 4, 2)
    assert str(parallel) == "tensor 2 x pipeline 2 x virtual 2 x expert 4 x data 4"
    assert ParallelConfig(processes=8, tensor=4, expert=8, expert_tensor=1).etp == 1
    assert str(ParallelConfig()) == ""
    parallel = ParallelConfig(processes=8, context=2, context_exchange="heads", expert=4)
    assert (parallel.model_parallel, parallel.data) == (2, 4)
    assert str(parallel) == "context 2 by heads x expert 4 x data 4"
    parallel = ParallelConfig(processes=4, pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 2, 3, 4))
    assert str(parallel) == "pipeline 2 of 1,2,3,4 layers x virtual 2 x data 2"


def test_layers_of_a_pipeline_rank_are_those_of_all_its_chunks():
    assert layout(pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 2, 3, 5)).stage_layers(11) == (4, 7)
    assert layout(pipeline=3, pipeline_layers=(1, 2, 3)).stage_layers(6) == (1, 2, 3)
    assert layout(pipeline=2, virtual_pipeline=2).stage_layers(8) == (4, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor": 0}, "--tensor-parallel must be at least 1, not 0"),
        ({"processes": 0}, "--processes must be at least 1, not 0"),
        ({"expert_tensor": -1}, "--expert-tensor-parallel must be at least 1, not -1"),
        ({"context": 0}, "--context-parallel must be at least 1, not 0"),
        ({"context_exchange": "heads"}, "--context-parallel-exchange heads needs --context-parallel 2 or more"),
        (
            {"processes": 6, "tensor": 2, "context": 2},
            "not a multiple of --tensor-parallel 2 x --pipeline-parallel 1 x --context-parallel 2; give --processes 4",
        ),
        ({"sequence_parallel": True}, "--sequence-parallel needs --tensor-parallel 2 or more"),
        (
            {"virtual_pipeline": 2},
            "--virtual-pipeline 2 needs --pipeline-parallel 2 or more, or give --virtual-pipeline 1",
        ),
        ({"pipeline_layers": (3,)}, "--pipeline-layers 3 needs --pipeline-parallel 2 or more"),
        (
            {"processes": 2, "pipeline": 2, "pipeline_layers": (5,)},
            "--pipeline-layers 5 has 1 number; give 2, the layers of each of --pipeline-parallel 2 model chunks$",
        ),
        (
            {"processes": 2, "pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (2, 3)},
            "2,3 has 2 numbers; give 4, the layers of each of --pipeline-parallel 2 x --virtual-pipeline 2 model chunks$",
        ),
        (
            {"processes": 2, "pipeline": 2, "pipeline_layers": (2, 0)},
            "--pipeline-layers 2,0: every model chunk needs a layer; give numbers of at least 1",
        ),
        (
            {"processes": 7, "tensor": 2, "pipeline": 1},
            "--processes 7 is not a multiple of --tensor-parallel 2 x --pipeline-parallel 1; give --processes 6",
        ),
        ({"tensor": 2, "pipeline": 2}, "--processes 1 .* give --processes 4"),
        (
            {"processes": 2, "expert": 4},
            "and of --expert-tensor-parallel 1 x --expert-parallel 4 x --pipeline-parallel 1; give --processes 4",
        ),
        ({"processes": 6, "tensor": 2, "expert": 2}, "--expert-tensor-parallel 2 x .*; give --processes 4"),
        ({"processes": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}, "give --processes 4"),
    ],
)
def test_a_layout_that_contradicts_itself(fields, words):
    with pytest.raises(UserError, match=words):
        ParallelConfig(**fields)


def layout(tensor=1, pipeline=1, expert=1, context=1, **others) -> ParallelConfig:
    """In a world that is large enough."""
    sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "context": context}
    return ParallelConfig(processes=tensor * pipeline * expert * context, **sizes, **others)


SEQUENCE = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("size", "parallel", "words"),
    [
        ("qwen3-tiny", layout(8), "--tensor-parallel 8 does not divide the model's 4 attention heads; give .* 4$"),
        ("llama-20m", layout(3), "--tensor-parallel 3 neither divides nor is a multiple .* 2 key/value heads; give .* 2$"),
        ("qwen3-tiny", layout(pipeline=3), "--pipeline-parallel 3 does not divide the model's 2 layers; give .* 2$"),
        (
            "qwen3-tiny",
            layout(pipeline=2, virtual_pipeline=2),
            "--pipeline-parallel 2 x --virtual-pipeline 2 does not divide .* 2 layers; give --virtual-pipeline 1$",
        ),
        (
            "llama-20m",
            layout(pipeline=3),
            "--pipeline-parallel 3 does not divide the model's 8 layers; give .* 2, or --pipeline-layers 3,3,2$",
        ),
        (
            "qwen3-0.6b",
            layout(pipeline=4, virtual_pipeline=2),
            "4 x --virtual-pipeline 2 .* 28 layers; give .* 1, or --pipeline-layers 4,4,4,4,3,3,3,3$",
        ),
        (
            "llama-20m",
            layout(pipeline=2, pipeline_layers=(2, 3)),
            "--pipeline-layers 2,3 are 5 layers, and the model has 8; give --pipeline-layers 4,4$",
        ),
        (
            "qwen3-tiny",
            layout(pipeline=3, pipeline_layers=(1, 1, 1)),
            "--pipeline-layers 1,1,1 are 3 layers, and the model has 2; give a smaller --pipeline-parallel$",
        ),
        ("qwen3-tiny", layout(expert=2), "--expert-parallel 2 is for MoE, and the model has no experts; give .* 1$"),
        ("qwen3-moe-tiny", layout(2), "MoE with --tensor-parallel 2 .*; give --sequence-parallel$"),
        ("qwen3-moe-tiny", layout(expert=3), "--expert-parallel 3 does not divide the model's 8 experts; give .* 2$"),
        ("deepseek-v2-tiny", layout(2), "MLA with --tensor-parallel 2 .*; give --sequence-parallel$"),
        ("qwen3-next-tiny", layout(2), "a gated delta net with --tensor-parallel 2 .*; give --sequence-parallel$"),
        (
            "qwen3-next-tiny",
            layout(4, **SEQUENCE),
            "--tensor-parallel 4 does not divide the model's 2 key heads of gated delta nets; give .* 2$",
        ),
        (
            "deepseek-v3-tiny",
            layout(8, **SEQUENCE),
            "--tensor-parallel 8 does not divide the model's 4 attention heads; give --tensor-parallel 4$",
        ),
        ("qwen3-next-tiny", layout(context=2), "--context-parallel 2: a gated delta net is not .*; give --context-parallel 1$"),
        ("glm-10b-tiny", layout(context=2), "--context-parallel 2: a prefix LM is not .*; give --context-parallel 1$"),
        (
            "qwen3-tiny",
            layout(2, context=2, context_exchange="heads"),
            "--context-parallel-exchange heads: --tensor-parallel 2 x --context-parallel 2 does not divide the model's 2 "
            "key/value heads; give --context-parallel-exchange gather$",
        ),
        (
            "deepseek-v3-tiny",
            layout(context=3, context_exchange="heads"),
            "does not divide the model's 4 attention heads; give --context-parallel-exchange gather$",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_cut(size, parallel, words):
    with pytest.raises(UserError, match=words):
        parallel.check_model(registry.sizes()[size])


def changed(size: str, mixer: dict | None = None, mlp: dict | None = None) -> Architecture:
    """A size with other sizes of its mixers, and of its MLPs or experts."""

    def change(layer: Layer) -> Layer:
        inner, fields = layer.mlp, mlp or {}
        if isinstance(inner, MoE):
            fields = {name: replace(getattr(inner, name), ffn_hidden_size=rows) for name, rows in fields.items()}
        return replace(layer, mixer=replace(layer.mixer, **mixer or {}), mlp=replace(inner, **fields))

    return registry.sizes()[size].with_layers(change)


@pytest.mark.parametrize(
    ("model", "parallel", "words"),
    [
        (changed("qwen3-tiny", mlp={"ffn_hidden_size": 90}), layout(4), "the model's 90 rows of an MLP's up_proj; .* 2$"),
        (
            changed("qwen3-tiny", mlp={"ffn_hidden_size": 91}),
            layout(2, **SEQUENCE),
            "91 rows of an MLP's up_proj; give --tensor-parallel 1 without --sequence-parallel$",
        ),
        (changed("qwen3-moe-tiny", mlp={"expert": 33}), layout(2, **SEQUENCE), "--tensor-parallel 2 .* 33 rows of an expert's"),
        (
            changed("qwen3-moe-tiny", mlp={"expert": 33}),
            layout(2, expert_tensor=2, **SEQUENCE),
            "--expert-tensor-parallel 2 does not divide the 33 rows .* give --expert-tensor-parallel 1$",
        ),
        (changed("qwen2-moe-tiny", mlp={"shared": 65}), layout(2, **SEQUENCE), "the model's 65 rows of the shared experts'"),
    ],
)  # fmt: skip
def test_an_mlp_that_cannot_be_cut(model, parallel, words):
    with pytest.raises(UserError, match=words):
        parallel.check_model(model)


@pytest.mark.parametrize(
    "values", [{"attention": {"dropout": 0.1}}, {"residual": {"dropout": 0.1}}, {"embedding": {"dropout": 0.1}}]
)
def test_dropout_under_context_parallelism(values):
    model = registry.sizes()["qwen3-tiny"]
    layout(context=2).check_model(model)
    with pytest.raises(UserError, match="--context-parallel 2: dropout is not .*; give --context-parallel 1$"):
        layout(context=2).check_model(model.with_values(**values))


@pytest.mark.parametrize(("rank", "words"), [("q_lora_rank", "q_a_proj"), ("kv_lora_rank", "kv_a_proj")])
def test_mla_ranks_that_cannot_be_cut(rank, words):
    model = changed("deepseek-v3-tiny", mixer={rank: 21})
    assert all(isinstance(layer.mixer, LatentAttention) for layer in model.layers)
    with pytest.raises(UserError, match=f"rows of MLA's {words}; give --tensor-parallel 1 without --sequence-parallel"):
        layout(2, **SEQUENCE).check_model(model)


def test_what_can_be_cut():
    """Fewer key/value heads than ranks, experts whole beside cut attention, an MLP that no layer has."""
    layout(6).check_model(changed("mpt-tiny", mixer={"heads": 12, "groups": 3}))
    odd = changed("qwen3-moe-tiny", mlp={"expert": 33})
    ParallelConfig(processes=2, tensor=2, expert=2, expert_tensor=1, **SEQUENCE).check_model(odd)
    layout(2, **SEQUENCE).check_model(replace(registry.sizes()["qwen3-moe-tiny"], unused_ffn_hidden_size=161))


@pytest.mark.parametrize(
    ("parallel", "changes", "words"),
    [
        (
            ParallelConfig(),
            {"global_batch_size": 7},
            "--global-batch-size 7 is not a multiple of --micro-batch-size 2 x 1 .*; give --global-batch-size 8$",
        ),
        (ParallelConfig(processes=2), {"global_batch_size": 10}, "2 data-parallel ranks; give --global-batch-size 12$"),
        (
            layout(pipeline=2, virtual_pipeline=2),
            {"global_batch_size": 6},
            r"micro batches per update \(3\) that is a multiple of --pipeline-parallel 2; give --global-batch-size 8$",
        ),
        (
            layout(2, **SEQUENCE),
            {"sequence_length": 63},
            "multiple of --tensor-parallel 2 .* give --sequence-length 64$",
        ),
        (
            layout(context=2),
            {"sequence_length": 62},
            "--context-parallel 2 needs sequences of a multiple of 4 tokens, not 62; give --sequence-length 64$",
        ),
        (
            layout(4, context=2, **SEQUENCE),
            {"sequence_length": 60},
            "--context-parallel 2 with --sequence-parallel over 4 ranks needs .* of 8 tokens, not 60; give .* 64$",
        ),
    ],
)
def test_an_update_that_cannot_be_cut(parallel, changes, words):
    sizes = {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 8}
    parallel.check_batch(**sizes)
    with pytest.raises(UserError, match=words):
        parallel.check_batch(**sizes | changes)
