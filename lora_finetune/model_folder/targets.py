"""Where LoRA goes: the linear layers of a model by their roles, under any name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from lora_finetune.base.errors import UserError
from lora_finetune.model_folder.config import model_family

import mlx.nn as nn

# What --targets takes: these roles, and words for several of them.
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "router", "experts")
WORDS = {"qv": "q,v,router", "attention": "q,k,v,o", "all": ",".join(ROLES[:-1])}

# The names of an attention's layers by their roles; of each role the first that is there counts. A
# module with queries is an attention. Latent attention has its queries from `q_b_proj`, and its
# values from the latent vector of `kv_a_proj_with_mqa`, the only linear layer on the way to them
# that each such model has; the keys come from the same vector and so change with it.
ATTENTION = {
    "q": ("q_b_proj", "q_proj", "c_q", "attn_query"),
    "k": ("k_proj", "c_k", "attn_key"),
    "v": ("v_proj", "c_v", "attn_value", "kv_a_proj_with_mqa", "kv_proj"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "attn_out", "attn_resid", "o_b_proj"),
}

# Fused projections: rows of all queries, then all keys, then all values; or grouped by key-value
# head, as in GPT-NeoX, InternLM2 and Qwen3-Next. Those of linear attention are the last of each.
CONTIGUOUS = ("qkv_proj", "q_k_v_proj", "qkvg_proj", "Wqkv", "W_pack", "c_attn", "att_proj",
              "in_proj_qkv")  # fmt: skip
GROUPED = ("query_key_value", "wqkv", "in_proj_qkvz")
NOT_GROUPED = ("bailing",)  # model families whose query_key_value is contiguous

# The names of an MLP's layers by their roles, in the order in which they are looked for: what `w3`
# is elsewhere is `w1` in qwen, and the gate its `w2`. Where `up` has twice the rows that `down`
# reads, the gate's are among them: first, or last in olmo's `ff_proj`, or in turns in phi3small's
# `up_proj`.
MLP = {
    "down": ("down_proj", "c_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "mlp_resid", "proj_2",
             "output_linear", "ff_out"),
    "up": ("up_proj", "w3", "v1", "c_fc_1", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "mlp_linear",
           "gate_up_proj", "proj_1", "input_linear", "ff_proj", "w1"),
    "gate": ("gate_proj", "w1", "c_fc_0", "mlp_gate", "w2"),
}  # fmt: skip

ROUTERS = ("gate", "router")

# DeepSeek's sparse attention chooses tokens with a small attention of its own, which is left alone.
EXCLUDED = ("indexer", "compressor")

Shape = tuple[int, ...]  # (d_out, d_in), of stacked experts (experts, d_out, d_in)


class Projection(NamedTuple):
    """A linear layer, or some of the rows of one."""

    role: str
    shape: Shape


class Layout(NamedTuple):
    """The rows of a fused projection: in groups, each of so many of every role, then others."""

    groups: int
    rows: dict[str, int]

    def num_rows(self, role: str) -> int:
        """The rows of a role in all groups."""
        return self.groups * self.rows[role]


def roles_of(targets: str) -> set[str]:
    """The roles that --targets names."""
    return {role for word in targets.split(",") for role in WORDS.get(word, word).split(",")}


def roles_at(model: nn.Module, paths: Iterable[str]) -> dict[str, set[str]]:
    """The roles of the layers at some paths: of a fused projection those of all its rows."""
    roles = {path: set() for path in paths}
    for path, projection in projections(model).items():
        for place in (path, path.rpartition(".")[0]):
            if place in roles:
                roles[place].add(projection.role)
    return roles


def find_targets(model: nn.Module, num_layers: int, targets: str = "qv") -> list[str]:
    """The paths of the projections to adapt in the last layers (all, where there are fewer).

    They are those with the roles that `targets` names, as --targets does.

    Raises:
        UserError: there are none in those layers, or routers alone.
    """
    last, roles = last_layers(model, num_layers), roles_of(targets)
    layers = projections(model).items()
    found = {path: p.role for path, p in layers if p.role in roles and path.startswith(last)}
    if not set(found.values()) - ({"router"} if roles != {"router"} else set()):
        what = "no attention" if roles & ATTENTION.keys() else f"nothing of --targets {targets}"
        raise UserError(
            f"the last {min(num_layers, len(model.layers))} layers of this model "
            f"({model_family(type(model))}) have {what} for LoRA to adapt; raise "
            "--lora-layers, or take another model"
        )
    return sorted(found, key=natural_order)


def projections(model: nn.Module) -> dict[str, Projection]:
    """All layers that have a role, by their paths; rows of a fused projection P are P.q, P.up, …"""
    found = dict(router_projections(model))
    for path, module in model.named_modules():
        parts = path.split(".")
        if not any(name in EXCLUDED for name in parts):
            for name, (role, shape) in projections_in(model, module):
                role = "experts" if len(shape) == 3 or "experts" in parts else role
                found[f"{path}.{name}"] = Projection(role, shape)
    return found


def projections_in(model: nn.Module, module: nn.Module) -> Iterator[tuple[str, Projection]]:
    """Those among the children of a module that is an attention or an MLP, or neither."""
    layers = module.items()
    shapes = {name: linear_shape(x) for name, x in layers if is_linear(x) or is_stacked(x)}
    fused = [name for name in (*CONTIGUOUS, *GROUPED) if name in shapes]
    has_queries = any(name in shapes for name in ATTENTION["q"])
    names, mlp = named(ATTENTION, shapes) if fused or has_queries else {}, named(MLP, shapes)
    # The last layer of an MLP maps back to what its first reads.
    if {"down", "up"} <= mlp.keys() and shapes[mlp["down"]][-2] == shapes[mlp["up"]][-1]:
        if shapes[mlp["up"]][-2] == 2 * shapes[mlp["down"]][-1]:
            fused.append(mlp.pop("up"))
        names |= mlp
    for role, name in names.items():
        yield name, Projection(role, shapes[name])
    for name in fused:
        layout = fused_layout(model, module, name)
        for role in layout.rows:
            yield f"{name}.{role}", Projection(role, (layout.num_rows(role), shapes[name][-1]))


def named(table: dict[str, tuple[str, ...]], names: Container[str]) -> dict[str, str]:
    """For each role the first of the table's names that is there, and has no role yet."""
    found = {}
    for role, candidates in table.items():
        free = (name for name in candidates if name in names and name not in found.values())
        if name := next(free, None):
            found[role] = name
    return found


def fused_layout(model: nn.Module, parent: nn.Module, name: str) -> Layout:
    """The layout of a fused projection, from its shape and that of the output projection.

    What an attention's output projection reads is as wide as the queries; in linear attention,
    whose keys are as wide as the queries, it is as wide as the values. Rows after the values (`…g`,
    `…z`) are a gate of that width, which has no role.
    """
    rows = linear_shape(parent[name])[0]
    if name == MLP["up"][0]:
        return Layout(rows // 2, {"gate": 1, "up": 1})
    if name in MLP["up"]:
        order = ("up", "gate") if name == "ff_proj" else ("gate", "up")
        return Layout(1, dict.fromkeys(order, rows // 2))
    width = linear_shape(parent[named(ATTENTION, parent)["o"]])[1]
    if name.startswith("in_proj"):
        v = width
        q = k = (rows - (2 * v if name.endswith("z") else v)) // 2
        head = getattr(parent, "head_k_dim", k)
    else:
        q = width
        k = v = (rows - (2 * q if name.startswith("qkvg") else q)) // 2
        head = getattr(parent, "head_dim", k)
    is_grouped = name in GROUPED and not model_family(type(model)).startswith(NOT_GROUPED)
    groups = k // head if is_grouped else 1
    return Layout(groups, {"q": q // groups, "k": k // groups, "v": v // groups})


def router_projections(model: nn.Module) -> Iterator[tuple[str, Projection]]:
    """The routers of all mixtures of experts: each a linear layer, or holds one, or a weight."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in ROUTERS or any(p in path for p in ("attn", "attention")):
            continue
        if "weight" in module and module.weight.ndim == 2:
            yield path, Projection("router", linear_shape(module))
        else:
            for name, child in module.items():
                if is_linear(child):
                    yield f"{path}.{name}", Projection("router", linear_shape(child))


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer, of MLX or of mlx-lm, float or quantized."""
    is_named = isinstance(module, nn.Module) and "Linear" in type(module).__name__
    return is_named and "weight" in module and module.weight.ndim == 2


def is_stacked(module: object) -> bool:
    """Whether a module is the stacked linear layers of experts, float or quantized."""
    return isinstance(module, nn.Module) and type(module).__name__.endswith("SwitchLinear")


def is_expert(path: str, module: nn.Module) -> bool:
    """Whether a layer is one of experts, which are stacked or in a list."""
    return is_stacked(module) or "experts" in path.split(".")


def linear_shape(linear: nn.Module) -> Shape:
    """The shape of a layer's weight, which quantized weights do not show, or of a router's."""
    if is_stacked(linear):
        return linear.num_experts, linear.output_dims, linear.input_dims
    if hasattr(linear, "in_features"):
        return linear.out_features, linear.in_features
    d_out, d_in = linear.weight.shape
    if "scales" in linear:
        d_in = linear.scales.shape[-1] * linear.group_size
    return d_out, d_in


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of the model's layers, such as `model.layers.9`, from first to last."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers]


def last_layers(model: nn.Module, number: int) -> tuple[str, ...]:
    """The beginnings of all paths in the last layers of a model."""
    return tuple(f"{path}." for path in layer_paths(model)[-number:])


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key under which layer 9 comes before layer 10."""
    return [(len(name) if name.isdecimal() else 0, name) for name in path.split(".")]
