"""TransformerEngine 2.20's modules, written out in plain torch: names, arguments, parameters and extra states are its own.

From transformer_engine/pytorch/module/{linear,layernorm_linear,grouped_linear,layernorm,rmsnorm,base}.py at d0067d0da6cb, recipes
and autocast from common/recipe and pytorch/quantization.py. Products are never in FP8: a module says which recipe it would have
used (`fp8_meta["recipe"]`), and delayed scaling keeps its amax histories. Megatron-Core's wrappers run on it where
TransformerEngine cannot be installed: `install` before Megatron-Core is imported.
"""

import contextlib
import importlib.machinery
import os
import pickle
import sys
from collections import namedtuple
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import torch

VERSION = "2.20.0"


_RECIPES = "transformer_engine.common.recipe"
_FormatHelper = namedtuple("_FormatHelper", ["max_fwd", "max_bwd"], module=_RECIPES)


class Format(Enum):
    E4M3 = _FormatHelper(max_fwd=448, max_bwd=448)
    HYBRID = _FormatHelper(max_fwd=448, max_bwd=57344)


class _Recipe:
    """A pydantic dataclass there: arguments without a field are ignored."""

    def __init__(self, **given):
        self.fp8_format = given["fp8_format"]


class DelayedScaling(_Recipe):
    def __init__(self, *, margin=0, amax_history_len=1024, amax_compute_algo="max", **given):
        super().__init__(**given)
        self.margin, self.amax_history_len, self.amax_compute_algo = margin, amax_history_len, amax_compute_algo


class Float8CurrentScaling(_Recipe):
    pass


class Float8BlockScaling(_Recipe):
    pass


class MXFP8BlockScaling(_Recipe):
    pass


for _each in (Format, DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling):
    _each.__module__ = _RECIPES  # by which a pickle names it


class FP8GlobalStateManager:
    recipes: ClassVar[list] = []  # of the contexts entered
    modules: ClassVar[dict] = {}  # with amax to be put into their histories

    @classmethod
    def is_fp8_enabled(cls):
        return bool(cls.recipes and cls.recipes[-1])

    @classmethod
    def update(cls):
        for module in cls.modules.values():
            for way in ("scaling_fwd", "scaling_bwd"):
                state = module.fp8_meta[way]
                state.amax_history.copy_(state.amax_history.roll(-1, 0))
                state.amax_history[0] = 0
        cls.modules.clear()


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    FP8GlobalStateManager.recipes.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        FP8GlobalStateManager.recipes.pop()
        if enabled and not FP8GlobalStateManager.recipes and torch.is_grad_enabled():
            FP8GlobalStateManager.update()


class _ExtraState:
    """An empty byte tensor but for delayed scaling, whose state is a pickle; None and empty tensors are read."""

    def get_extra_state(self):
        if not hasattr(self, "fp8_meta") or not isinstance(self.fp8_meta["recipe"], DelayedScaling):
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": {"num_gemms": self.fp8_meta["num_gemms"]}}
        for way in ("fwd", "bwd"):
            state[f"scale_{way}"] = self.fp8_meta[f"scaling_{way}"].scale
            state[f"amax_history_{way}"] = self.fp8_meta[f"scaling_{way}"].amax_history
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is None or state.numel() == 0:
            return
        if os.getenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "0") != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")
        loaded = pickle.loads(state.numpy().tobytes())
        self.fp8_meta.update(loaded["extra_fp8_variables"])
        self._start(loaded["recipe"])
        for way in ("fwd", "bwd"):
            self.fp8_meta[f"scaling_{way}"].scale.copy_(loaded[f"scale_{way}"])
            self.fp8_meta[f"scaling_{way}"].amax_history.copy_(loaded[f"amax_history_{way}"])


class Fp8Padding(torch.nn.Module):
    """Rows of each expert, filled up with zeros to a multiple of 16."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__()

    def forward(self, inp, m_splits):
        padded = [-(-rows // 16) * 16 for rows in m_splits]
        parts = zip(inp.split(m_splits), m_splits, padded, strict=True)
        filled = [torch.nn.functional.pad(part, (0, 0, 0, more - rows)) for part, rows, more in parts]
        return torch.cat(filled), padded


class Fp8Unpadding(Fp8Padding):
    def forward(self, inp, m_splits):
        parts = inp.split([-(-rows // 16) * 16 for rows in m_splits])
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])


class _Base(_ExtraState, torch.nn.Module):
    """Attributes that Megatron-Core reads, and tensor parallelism: TransformerEngine gathers and reduces by itself."""

    save_original_input = False

    def _prepare(self, tp_group, tp_size, parallel_mode, sequence_parallel, bias, return_bias, tracker, dtype, device):
        torch.nn.Module.__init__(self)
        assert parallel_mode in ("column", "row", None)
        self.parallel_mode, self.tp_group = parallel_mode, tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias = bias, return_bias
        self.apply_bias = bias and not return_bias
        self._tracker, self._like = tracker, {"dtype": dtype, "device": device}
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False, "recipe": None}, False, False

    def init_fp8_metadata(self, num_gemms=1):
        """As `module/base.py`: `fp8` says whether a state is written."""
        self.fp8_meta["num_gemms"] = num_gemms
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta["fp8_checkpoint"] = self.fp8
        if self.fp8:
            self._start(FP8GlobalStateManager.recipes[-1])

    def _start(self, recipe):
        self.fp8_meta["recipe"], count = recipe, self.fp8_meta["num_gemms"]
        if isinstance(recipe, DelayedScaling) and "scaling_fwd" not in self.fp8_meta:
            for way, tensors in (("fwd", 3), ("bwd", 2)):
                history = torch.zeros(recipe.amax_history_len, tensors * count)
                self.fp8_meta[f"scaling_{way}"] = SimpleNamespace(
                    scale=torch.ones(tensors * count), amax_history=history
                )

    def _in_fp8(self, inputs, weights):
        """Before a forward pass: the recipe, and amax of inputs and weights."""
        self.init_fp8_metadata(len(weights))
        if self.fp8 and isinstance(self.fp8_meta["recipe"], DelayedScaling):
            latest = self.fp8_meta["scaling_fwd"].amax_history[0]
            for index, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
                for place, tensor in enumerate((x, weight)):
                    amax = tensor.detach().abs().amax() if tensor.numel() else torch.tensor(0.0)
                    latest[3 * index + place] = torch.maximum(latest[3 * index + place], amax)
            FP8GlobalStateManager.modules[id(self)] = self

    def _split(self, inputs, outputs):
        assert (outputs if self.parallel_mode == "column" else inputs) % self.tp_size == 0
        return (
            inputs // self.tp_size if self.parallel_mode == "row" else inputs,
            outputs // self.tp_size if self.parallel_mode == "column" else outputs,
        )

    def _add(self, suffix, inputs, outputs, init_method):
        weight = torch.nn.Parameter(torch.empty(outputs, inputs, **self._like))
        tracker = self._tracker() if self._tracker else None
        with tracker.fork() if tracker else contextlib.nullcontext(), torch.no_grad():
            init_method(weight)
        weight.tensor_model_parallel, weight.partition_stride = True, 1
        weight.partition_dim = 1 if self.parallel_mode == "row" else 0
        self.register_parameter(f"weight{suffix}", weight)
        if not self.use_bias:
            setattr(self, f"bias{suffix}", torch.Tensor().to(**self._like))
            return
        bias = torch.nn.Parameter(torch.zeros(outputs, **self._like))
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1
        self.register_parameter(f"bias{suffix}", bias)

    def _product(self, x):
        from megatron.core.tensor_parallel import mappings

        parallel = {} if self.tp_group is None else {"group": self.tp_group}
        if self.parallel_mode == "column" and self.tp_size > 1:
            into = (
                "gather_from_sequence_parallel_region"
                if self.sequence_parallel
                else "copy_to_tensor_model_parallel_region"
            )
            x = getattr(mappings, into)(x, **parallel)
        self._in_fp8([x], [self.weight])
        out = torch.nn.functional.linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            reduce = (
                "reduce_scatter_to_sequence_parallel_region"
                if self.sequence_parallel
                else "reduce_from_tensor_model_parallel_region"
            )
            out = getattr(mappings, reduce)(out, **parallel)
        if self.apply_bias:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class Linear(_Base):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
        get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False,
        ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None,
        delay_wgrad_compute=False, symmetric_ar_type=None, save_original_input=False, name=None,
    ):  # fmt: skip
        self._prepare(
            tp_group, tp_size, parallel_mode, sequence_parallel, bias, return_bias, get_rng_state_tracker, params_dtype,
            device,
        )  # fmt: skip
        self.in_features, self.out_features = self._split(in_features, out_features)
        self._add("", self.in_features, self.out_features, init_method)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return self._product(inp)


class LayerNormLinear(_Base):
    def __init__(
        self, in_features, out_features, eps=1e-5, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, normalization="LayerNorm",
        return_bias=False, params_dtype=None, parallel_mode=None, return_layernorm_output=False,
        return_layernorm_output_gathered=False, parameters_split=None, zero_centered_gamma=False, device="cuda",
        ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_wgrad=False, ub_bulk_dgrad=False,
        ub_name=None, delay_wgrad_compute=False, symmetric_ar_type=None, name=None,
    ):  # fmt: skip
        assert normalization in ("LayerNorm", "RMSNorm")
        self._prepare(
            tp_group, tp_size, parallel_mode, sequence_parallel, bias, return_bias, get_rng_state_tracker, params_dtype,
            device,
        )  # fmt: skip
        assert parallel_mode != "row"
        self.in_features, self.out_features = self._split(in_features, out_features)
        self.eps, self.zero_centered_gamma, self.normalization = eps, zero_centered_gamma, normalization
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(start(in_features, **self._like))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, **self._like))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel
        self._add("", self.in_features, self.out_features, init_method)

    def forward(self, inp, is_first_microbatch=None, fp8_grad=False):
        return self._product(_norm(inp, self.layer_norm_weight, self.layer_norm_bias, self))


class GroupedLinear(_Base):
    def __init__(
        self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, device="cuda", ub_overlap_rs=False, ub_overlap_ag=False, ub_name=None,
        delay_wgrad_compute=False, save_original_input=False, single_grouped_weight=False, single_grouped_bias=False,
        name=None, use_grouped_tensor=None,
    ):  # fmt: skip
        assert not single_grouped_weight
        assert not single_grouped_bias
        self._prepare(
            tp_group, tp_size, parallel_mode, sequence_parallel, bias, return_bias, get_rng_state_tracker, params_dtype,
            device,
        )  # fmt: skip
        assert self.tp_size == 1 or not bias
        self.num_gemms = num_gemms
        self.single_grouped_weight, self.single_grouped_bias = single_grouped_weight, single_grouped_bias
        self.in_features, self.out_features = self._split(in_features, out_features)
        for index in range(num_gemms):
            self._add(index, self.in_features, self.out_features, init_method)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        assert len(m_splits) == self.num_gemms
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        parts = []
        self._in_fp8(inp.split(m_splits), [getattr(self, f"weight{index}") for index in range(self.num_gemms)])
        for index, rows in enumerate(inp.split(m_splits)):
            part = torch.nn.functional.linear(rows, getattr(self, f"weight{index}"))
            parts.append(part + biases[index] if self.apply_bias else part)
        return (torch.cat(parts), biases) if self.return_bias else torch.cat(parts)


class _Norm(_ExtraState, torch.nn.Module):
    normalization = ""

    def __init__(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
        hidden_size=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        assert hidden_size is None
        assert params_dtype is None or dtype is None
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        like = {"device": device, "dtype": params_dtype or dtype}
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(start(normalized_shape, **like))
        self.bias = (
            torch.nn.Parameter(torch.zeros(normalized_shape, **like)) if self.normalization == "LayerNorm" else None
        )
        for parameter in self.parameters():
            if sequence_parallel is not None:
                parameter.sequence_parallel = sequence_parallel

    def forward(self, x):
        return _norm(x, self.weight, self.bias, self)


class LayerNorm(_Norm):
    normalization = "LayerNorm"


class RMSNorm(_Norm):
    normalization = "RMSNorm"


def _norm(x, weight, bias, of):
    """In fp32, one downcast."""
    states = x.float()
    if of.normalization == "LayerNorm":
        states = states - states.mean(-1, keepdim=True)
    states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + of.eps)
    states = states * (1.0 + weight.float() if of.zero_centered_gamma else weight.float())
    return (states if bias is None else states + bias.float()).to(x.dtype)


class _NotHere(torch.nn.Module):
    """A class that Megatron-Core derives from and Baton does not use."""

    def __init__(self, *given, **named):
        raise AssertionError(type(self).__name__)


def install():
    """The packages, in `sys.modules`."""

    def module(name, **content):
        made = sys.modules[name] = ModuleType(name)
        made.__path__, made.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        vars(made).update(content)
        return made

    def unused(name):
        return type(name, (_NotHere,), {})

    # Of FP8 and of fused routers: imported by Megatron-Core, and not called.
    module("transformer_engine.pytorch.tensor", QuantizedTensor=unused("QuantizedTensor"))
    names = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    module("transformer_engine.pytorch.router", **dict.fromkeys(names))
    modules = (Linear, LayerNormLinear, GroupedLinear, LayerNorm, RMSNorm)
    fp8 = module(
        "transformer_engine.pytorch.fp8",
        FP8GlobalStateManager=FP8GlobalStateManager,
        fp8_autocast=fp8_autocast,
        fp8_model_init=None,
    )
    distributed = module(
        "transformer_engine.pytorch.distributed",
        CudaRNGStatesTracker=unused("CudaRNGStatesTracker"),
        activation_recompute_forward=None,
    )
    recipes = (Format, DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling)
    recipe = module(_RECIPES, _FormatHelper=_FormatHelper, **{each.__name__: each for each in recipes})
    pytorch = module(
        "transformer_engine.pytorch",
        **{each.__name__: each for each in modules},
        DotProductAttention=unused("DotProductAttention"),
        Fp8Padding=Fp8Padding,
        Fp8Unpadding=Fp8Unpadding,
        fp8_autocast=fp8_autocast,
        fp8=fp8,
        distributed=distributed,
    )
    common = module("transformer_engine.common", recipe=recipe)
    module("transformer_engine", __version__=VERSION, pytorch=pytorch, common=common)
