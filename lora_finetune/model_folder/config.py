"""A config.json of transformers 5, translated into the settings that mlx-lm reads.

transformers 5 saves rotary settings as `rope_parameters`, the kinds of layers as `layer_types` and
`mlp_layer_types`, and many settings under other names than before. mlx-lm 0.32 mostly reads the
older words, and takes a default of its own for what it does not find.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_finetune.base.errors import UserError

from mlx_lm.models.base import BaseModelArgs
from mlx_lm.utils import _get_classes
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

Settings = dict[str, Any]

# mlx-lm's names for model types of transformers, where they differ by more than a final `_text`.
# Ministral is a Llama with windows, as mlx-lm's llama is.
MODEL_TYPES = {"bailing_hybrid": "bailing_moe_v3", "lfm2_vl": "lfm2-vl"}
MODEL_TYPES |= {"ministral": "llama", "youtu": "youtu_llm"}

# Settings that mlx-lm requires and transformers does not save: constants in its code.
CONSTANTS = {
    "mlp_bias": False, "post_norm": False, "qk_norm": True,
    "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
    "first_k_dense_replace": 0, "n_shared_experts": None, "shared_intermediate_size": 0,
    "attention_method": "MLA", "zero_expert_type": "identity",
    "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "norm_topk_prob": True,
    "rope_theta": 10000.0,
}  # fmt: skip

# mlx-lm's name: transformers' name of the same setting, where its configuration has no alias.
SAME = {
    "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor",
    "block_dim": "hidden_size", "block_ff_dim": "intermediate_size", "n_ctx": "n_positions",
    "layernorm_epsilon": "rms_norm_eps", "sliding_window_size": "sliding_window",
    "swa_rope_theta": "rope_local_base_freq", "swa_num_attention_heads": "num_attention_heads",
    "swa_head_dim": "head_dim", "swa_v_head_dim": "v_head_dim",
    "moe_shared_expert_intermediate_size": "moe_intermediate_size",
}  # fmt: skip


def pytorch_settings(config: Settings) -> PretrainedConfig | None:
    """The settings of the text model in a config.json as transformers has them, with all defaults.

    None for a type that it does not know. It may raise anything. No code comes from the model.
    """
    names = config.get("architectures") or ["MiniMaxM2ForCausalLM"]
    if config.get("model_type") == "minimax" and str(names[0]).startswith("MiniMaxM2"):
        config = config | {"model_type": "minimax_m2"}  # mlx-lm's; transformers' is another model
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    # "su" is what longrope was called at first; transformers looks for its length too early.
    text = json.dumps(config).replace('"su"', '"longrope"')
    whole = AutoConfig.for_model(**json.loads(text))
    theirs = whole.get_text_config(decoder=True)
    if isinstance(theirs, dict):  # Pixtral's
        return pytorch_settings(theirs)
    said = (config.get("text_config") or config).get("hidden_size")
    if said not in (None, getattr(theirs, "hidden_size", said)):
        return None  # text settings that stand where transformers does not look for them
    if hasattr(whole, "tie_word_embeddings"):  # transformers ties by the outer one
        theirs.tie_word_embeddings = whole.tie_word_embeddings
    return theirs


def pytorch_program(theirs: PretrainedConfig) -> str:
    """The source text of transformers' model; it is not run."""
    file = Path(inspect.getfile(type(theirs)))
    program = file.with_name(file.name.replace("configuration_", "modeling_"))
    if not program.exists():  # such models, exaone for one, are Llama's
        program = file.parents[1] / "llama" / "modeling_llama.py"
    return program.read_text("utf-8")


def in_mlx_words(config: Settings, theirs: PretrainedConfig | None = None) -> Settings:
    """The settings of a config.json of transformers 5 as mlx-lm has them; others are left alone.

    None is removed. `theirs`, its `pytorch_settings`, has those that config.json leaves out.
    """
    if not is_of_transformers_5(config):
        return config
    config = with_model_type(config)
    module = mlx_module(config)
    if module is None:
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        return translated(config, [module.ModelArgs], theirs)
    if "tie_word_embeddings" in config:  # there transformers ties by the outer one
        text = text | {"tie_word_embeddings": config["tie_word_embeddings"]}
    config["text_config"] = text = translated(text, text_classes(module, text), theirs)
    return text | config


def is_of_transformers_5(config: Settings) -> bool:
    """Whether a configuration was saved by transformers 5, or has its words for rotary settings."""
    if config.get("rope_parameters") or (config.get("text_config") or {}).get("rope_parameters"):
        return True
    major = str(config.get("transformers_version", "")).partition(".")[0]
    return major.isdecimal() and int(major) >= 5


# --- What mlx-lm reads --------------------------------------------------------------------------


def with_model_type(config: Settings) -> Settings:
    """The configuration with mlx-lm's model type; a text model may become the text of a wrapper.

    Llama 4's text model is mlx-lm's llama4 where it has experts; its llama4_text has none.
    """
    model_type = MODEL_TYPES.get(config["model_type"], config["model_type"])
    config, whole = config | {"model_type": model_type}, model_type.removesuffix("_text")
    has_experts = model_type == "llama4_text" and config.get("moe_layers")
    if whole == model_type or (mlx_module(config) and not has_experts):
        return config
    return config | {"model_type": whole, "text_config": config}


def mlx_module(config: Settings) -> ModuleType | None:
    """The module that mlx-lm builds the model with, None where it cannot be imported."""
    try:
        return sys.modules[_get_classes(config)[1].__module__]
    except (Exception, SystemExit):  # mlx-lm will say why; olmo's exits
        return None


def model_family(model_class: type) -> str:
    """The name of the mlx-lm module that a model's class comes from, such as "qwen2_moe"."""
    return model_class.__module__.rpartition(".")[2]


def text_classes(module: ModuleType, text: Settings) -> list[type]:
    """The dataclasses of mlx-lm that may read the text settings of a wrapper."""
    modules = [module, mlx_module(text), *vars(module).values()]
    found = [each for m in modules if isinstance(m, ModuleType) for each in vars(m).values()]
    classes = [c for c in found if isinstance(c, type) and issubclass(c, BaseModelArgs)]
    return [c for c in classes if "text_config" not in c.__dataclass_fields__]


# --- The settings -------------------------------------------------------------------------------


def translated(
    settings: Settings, classes: list[type], theirs: PretrainedConfig | None
) -> Settings:
    """Text settings with those that the given classes of mlx-lm read, by their names there."""
    fields = {field.name: field for each in classes for field in dataclasses.fields(each)}
    # mlx-lm would add layers for such an input to models that do not name it, since they have none.
    settings = {"hidden_size_per_layer_input": 0} | settings | rotary(settings)
    settings |= other_meanings(settings, fields)
    for name, field in fields.items():
        value = settings.get(name)
        if value is None and name in DERIVED:
            with suppress(KeyError):
                value = DERIVED[name](settings)
        if value is None and not name.startswith("rope"):
            value = getattr(theirs, name, None)
        if value is not None:
            settings[name] = value
        elif name in CONSTANTS and field.default is dataclasses.MISSING:
            settings[name] = CONSTANTS[name]
    return settings


def rotary(settings: Settings) -> Settings:
    """`rope_parameters` as `rope_theta`, `partial_rotary_factor` and `rope_scaling`.

    Where `rope_parameters` differ by kind of layer, those of full attention are taken, and the
    theta of the others becomes `rope_local_base_freq`.
    """
    parameters = settings.get("rope_parameters")
    if not parameters:
        return {}
    whole_head = {"partial_rotary_factor": 1.0}
    by_kind = {kind: whole_head | p for kind, p in parameters.items() if isinstance(p, dict)}
    full = by_kind.get("full_attention", next(iter(by_kind.values()), parameters))
    rest = whole_head | full
    found = {"partial_rotary_factor": rest.pop("partial_rotary_factor")}
    if "rope_theta" in rest:
        found["rope_theta"] = rest.pop("rope_theta")
    local = [p["rope_theta"] for p in by_kind.values() if p is not full and "rope_theta" in p]
    if local:
        found["rope_local_base_freq"] = local[0]
    kind = rest.get("rope_type", "default")
    is_scaled = kind != "default" or "mrope_section" in rest
    found["rope_scaling"] = rest | {"type": kind, "rope_type": kind} if is_scaled else None
    return found | {"rope_parameters": by_kind or parameters}


def other_meanings(settings: Settings, fields: dict[str, dataclasses.Field]) -> Settings:
    """Settings that have another meaning in mlx-lm under the same name."""
    found = {}
    if "linear_head_dim" in settings and "short_conv_kernel_size" in fields:  # Bailing's
        found["head_dim"] = settings["linear_head_dim"]
    if "mamba_n_heads" in fields and "layer_types" in fields:  # Granite's hybrids
        found["layer_types"] = ["attention" if full else "mamba" for full in is_full(settings)]
    if "str" in str(getattr(fields.get("sliding_window_pattern"), "type", "")):  # EXAONE's
        found["sliding_window_pattern"] = "".join("LG"[full] for full in is_full(settings))
    if "hybrid_layer_pattern" in fields:  # MiMo's
        found["moe_layer_freq"] = [int(sparse) for sparse in is_sparse(settings)]
    return found


def is_full(settings: Settings) -> list[bool]:
    """Whether each layer has full attention."""
    return ["full" in kind for kind in settings["layer_types"]]


def is_sparse(settings: Settings) -> list[bool]:
    """Whether each layer is a mixture of experts."""
    return [kind == "sparse" for kind in settings["mlp_layer_types"]]


def linear_attention(settings: Settings) -> Settings:
    """The settings of Kimi's own configuration for linear attention; its layers count from 1."""
    full = is_full(settings)
    return {
        "kda_layers": [n for n, is_so in enumerate(full, 1) if not is_so],
        "full_attn_layers": [n for n, is_so in enumerate(full, 1) if is_so],
        "num_heads": settings["linear_num_heads"],
        "head_dim": settings["linear_head_dim"],
        "short_conv_kernel_size": settings["linear_conv_kernel_dim"],
    }


def period(settings: Settings) -> int:
    """Every how many layers one has full attention, the last of each group; or a UserError."""
    full = is_full(settings)
    found = [*full, True].index(True) + 1
    if full != [n % found == 0 for n in range(1, len(full) + 1)]:
        raise UserError(
            "the model's layer_types do not repeat, which mlx-lm cannot compute for this kind of "
            "model; take another model"
        )
    return found


# By mlx-lm's name, how a setting follows from transformers'; KeyError where it does not.
DERIVED: dict[str, Callable[[Settings], Any]] = {
    **{name: itemgetter(theirs) for name, theirs in SAME.items()},
    "head_dim": lambda s: s["hidden_size"] // s["num_attention_heads"],
    "n_inner": lambda s: 4 * s["n_embd"],
    "intermediate_size": lambda s: int(s["expand"] * s["hidden_size"]),
    "rotary_dim": lambda s: int(s["head_dim"] * s["partial_rotary_factor"]),
    "swa_num_key_value_heads": lambda s: 2 * s["num_key_value_heads"],
    "global_head_dim": lambda s: s["per_layer_config"][str(is_full(s).index(True))]["head_dim"],
    "position_embedding_type": lambda s: s["position_embedding_type"] or "nope",
    "full_attention_interval": period,
    "sliding_window_pattern": period,
    "hybrid_layer_pattern": lambda s: [int(not full) for full in is_full(s)],
    "is_moe_layer": is_sparse,
    "first_k_dense_replace": lambda s: [*is_sparse(s), True].index(True),
    "linear_attn_config": linear_attention,
}
