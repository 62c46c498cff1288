"""AttnLRP written out: a decoder's forward pass by hand, and relevance handed back rule by rule.

The oracle of `attribution/lrp.py`, with nothing of it: no modified gradient, no autograd, float64.
The rules are those of arXiv 2402.05602, section 3, with epsilon 0: epsilon for linear maps, Taylor
for the softmax, uniform for products, the identity for norms and activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
Back = Callable[[Tensor], Tensor]


def share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, part / whole)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Back]:
    """y = x w^T + b: an input gets its part of each output; the bias keeps its own."""
    y = x @ weight.T
    y = y if bias is None else y + bias
    return y, lambda r: x * (share(r, y) @ weight)


def rms_norm(x: Tensor, module: Any) -> tuple[Tensor, Back]:
    """Identity rule: what an output has goes to the input of the same place."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight.double()
    factor = 1 + weight if "Gemma" in type(module).__name__ else weight
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * factor, lambda r: r


def layer_norm(x: Tensor, module: Any) -> tuple[Tensor, Back]:
    """Centring and the affine map are linear; division by the deviation is the identity."""
    n = x.shape[-1]
    centring = torch.eye(n, dtype=x.dtype) - 1 / n
    centred, to_x = linear(x, centring)
    unit = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    weight, bias = module.weight.double(), module.bias.double()
    y = unit * weight + bias
    return y, lambda r: to_x(unit * weight * share(r, y))


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """One head, `[n, d]` each. Both products halve relevance (uniform rule)."""
    n = len(q)
    raw = q @ k.T
    near = torch.ones(n, n, dtype=torch.bool).tril()
    if window is not None:
        near &= torch.ones_like(near).triu(1 - window)
    scores = (raw * scale).masked_fill(~near, float("-inf"))
    weights = scores.softmax(-1)
    out = weights @ v

    def back(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ratio = share(r, 2 * out)
        to_weights = weights * (ratio @ v.T)
        to_v = v * (weights.T @ ratio)
        taylor = to_weights - weights * to_weights.sum(-1, keepdim=True)
        to_scores = torch.where(near, raw * scale, 0.0) * taylor
        part = share(to_scores, 2 * raw)
        return q * (part @ k), k * (part.T @ q), to_v

    return out, back


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Back]:
    """A rotation of each pair of dimensions: linear, its matrix other at each position."""
    half = x.shape[-1] // 2
    y = x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def back(r: Tensor) -> Tensor:
        ratio = share(r, y)
        turned = ratio * sin
        return x * (ratio * cos + torch.cat([turned[..., half:], -turned[..., :half]], -1))

    return y, back


class Attention:
    """Self-attention of all heads, with the projections around it."""

    def __init__(self, module: Any, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> None:
        if turn is None:  # GPT-2: one matrix, transposed
            parts = module.c_attn.weight.T.double().chunk(3)
            biases = module.c_attn.bias.double().chunk(3)
            out, out_bias = module.c_proj.weight.T.double(), module.c_proj.bias.double()
            d = x.shape[-1] // module.num_heads
            scale, window = d**-0.5, None
        else:
            names = (module.q_proj, module.k_proj, module.v_proj)
            parts = [m.weight.double() for m in names]
            biases = [None if m.bias is None else m.bias.double() for m in names]
            out, out_bias = module.o_proj.weight.double(), None
            d, scale = module.head_dim, module.scaling
            everywhere = getattr(module.config, "sliding_window", None)
            window = getattr(module, "sliding_window", everywhere)
        self.backs: list[list[Back]] = []
        heads = []
        for i, (weight, bias) in enumerate(zip(parts, biases, strict=True)):
            y, back = linear(x, weight, bias)
            backs = [back]
            y = y.unflatten(-1, (-1, d)).transpose(0, 1)  # [heads, n, d]
            if i < 2 and hasattr(module, "q_norm"):
                y, back = rms_norm(y, (module.q_norm, module.k_norm)[i])
                backs.append(back)
            if i < 2 and turn is not None:
                y, back = rotary(y, *turn)
                backs.append(back)
            heads.append(y)
            self.backs.append(backs)
        q, k, v = heads
        self.group = len(q) // len(k)
        done = [
            attend(q[h], k[h // self.group], v[h // self.group], scale=scale, window=window)
            for h in range(len(q))
        ]
        self.attended = [back for _, back in done]
        self.y, self.out_back = linear(torch.cat([y for y, _ in done], -1), out, out_bias)

    def back(self, r: Tensor) -> Tensor:
        r = self.out_back(r)
        per_head = r.unflatten(-1, (len(self.attended), -1)).transpose(0, 1)
        found = [back(own) for back, own in zip(self.attended, per_head, strict=True)]
        q, k, v = (torch.stack(parts) for parts in zip(*found, strict=True))
        k, v = (x.unflatten(0, (-1, self.group)).sum(1) for x in (k, v))
        total = torch.zeros(1, dtype=r.dtype)
        for own, (first, *later) in zip((q, k, v), self.backs, strict=True):
            for back in reversed(later):
                own = back(own)
            total = total + first(own.transpose(0, 1).flatten(1))
        return total


def feed_forward(module: Any, x: Tensor) -> tuple[Tensor, Back]:
    """Plain (GPT-2), or gated: the product halves relevance between its two sides."""
    if hasattr(module, "c_fc"):
        inner, first = linear(x, module.c_fc.weight.T.double(), module.c_fc.bias.double())
        y, last = linear(
            F.gelu(inner, approximate="tanh"),
            module.c_proj.weight.T.double(),
            module.c_proj.bias.double(),
        )
        return y, lambda r: first(last(r))
    gate, to_gate = linear(x, module.gate_proj.weight.double())
    up, to_up = linear(x, module.up_proj.weight.double())
    is_silu = "SiLU" in type(module.act_fn).__name__
    active = F.silu(gate) if is_silu else F.gelu(gate, approximate="tanh")
    y, last = linear(active * up, module.down_proj.weight.double())

    def back(r: Tensor) -> Tensor:
        half = last(r) / 2
        return to_gate(half) + to_up(half)

    return y, back


def plus(x: Tensor, branch: Tensor, back: Back) -> tuple[Tensor, Back]:
    """A residual sum: each side gets its part of it."""
    y = x + branch
    return y, lambda r: share(x * r, y) + back(share(branch * r, y))


def relevance(
    model: Any, ids: list[int], of_logits: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the logits `[n, vocab]` and each token's relevance `[n]`, float64.

    Args:
        model: GPT-2, Llama, Qwen 3 or Gemma 3.
        ids: what it reads.
        of_logits: relevance of the logits, given them.
    """
    body = getattr(model, "transformer", None) or model.model
    tokens = torch.tensor(ids)
    embedded = model.get_input_embeddings()(tokens).double()
    backs: list[Back] = []
    x = embedded
    at = torch.arange(len(ids))
    if hasattr(body, "wpe"):
        positions = body.wpe(at).double()
        x, back = plus(embedded, positions, lambda r: torch.zeros_like(r))
        backs.append(back)
    for layer in getattr(body, "h", None) or body.layers:
        x = _layer(layer, body, x, at, backs)
    norm = layer_norm if hasattr(body, "ln_f") else rms_norm
    x, back = norm(x, getattr(body, "ln_f", None) or body.norm)
    backs.append(back)
    logits, back = linear(x, model.lm_head.weight.double())
    r = back(of_logits(logits))
    for back in reversed(backs):
        r = back(r)
    return logits, r.sum(-1)


def _layer(layer: Any, body: Any, x: Tensor, at: Tensor, backs: list[Back]) -> Tensor:
    turn: tuple[Tensor, Tensor] | None
    if hasattr(layer, "ln_1"):
        norm, names, turn = layer_norm, ("ln_1", "", "ln_2", ""), None
        attention = layer.attn
    else:
        attention = layer.self_attn
        is_gemma = hasattr(layer, "pre_feedforward_layernorm")
        names = ("input_layernorm", "", "post_attention_layernorm", "")
        if is_gemma:
            after = ("post_attention_layernorm", "post_feedforward_layernorm")
            names = ("input_layernorm", after[0], "pre_feedforward_layernorm", after[1])
        kind = (attention.layer_type,) if is_gemma else ()
        cos, sin = body.rotary_emb(x, at.unsqueeze(0), *kind)
        norm, turn = rms_norm, (cos[0].double(), sin[0].double())

    def part(
        x: Tensor, before: str, run: Callable[[Tensor], tuple[Tensor, Back]], after: str
    ) -> Tensor:
        y, to_x = norm(x, getattr(layer, before))
        y, through = run(y)
        inner = through
        if after:
            y, through_norm = norm(y, getattr(layer, after))

            def inner(r: Tensor) -> Tensor:
                return through(through_norm(r))

        x, back = plus(x, y, lambda r: to_x(inner(r)))
        backs.append(back)
        return x

    def attends(y: Tensor) -> tuple[Tensor, Back]:
        done = Attention(attention, y, turn)
        return done.y, done.back

    x = part(x, names[0], attends, names[1])
    return part(x, names[2], lambda y: feed_forward(layer.mlp, y), names[3])
