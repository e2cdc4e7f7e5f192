"""ESM-2 in plain NumPy: one sequence, one function for each step, nothing fast and nothing left out.

    outputs = forward(tokens, **nested(checkpoint))

Everything else in this package computes the same numbers faster, and is judged by this file in float64.

Weights are nested dicts whose keys are argument names, so each step takes its share as `**block`. Shapes: L tokens,
`<cls>` and `<eos>` included; D width; H heads of C = D / H channels; F feed-forward width; N layers; V = 33 tokens.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Block = dict[str, Any]

PAD, EOS, MASK = 1, 2, 32


def forward(
    tokens: Array,  # (L,)
    embed_tokens: Block,
    rotary: Block,
    layers: list[Block],
    final_norm: Block | None = None,  # none for the first layers of a larger model
    **heads: Block,
) -> dict[str, Array]:  # representations (N + 1, L, D), attentions (N, L), logits (L, V), contacts (L - 2, L - 2)
    x = embed(tokens, **embed_tokens)
    representations, attentions, maps = [x], [], []
    for number, layer in enumerate(layers):
        x, attention = transformer_layer(x, tokens, rotary, **layer)
        representations.append(x)
        attentions.append(attention.mean(axis=(0, 1)))  # over heads and query positions
        if "contact_head" in heads:
            weight = heads["contact_head"]["weight"].reshape(len(layers), -1)[number]  # (H,)
            maps.append(np.tensordot(weight, contact_features(attention, tokens), axes=1))
    representations[-1] = x = layer_norm(x, **final_norm) if final_norm else x
    outputs = {"representations": np.stack(representations), "attentions": np.stack(attentions)}
    if "lm_head" in heads:
        outputs["logits"] = language_model(x, embed_tokens["weight"], **heads["lm_head"])
    if "contact_head" in heads:
        outputs["contacts"] = 1 / (1 + np.exp(-sum(maps) - heads["contact_head"]["bias"]))
    return outputs


def embed(tokens: Array, weight: Array) -> Array:  # (L,), (V, D) -> (L, D)
    masked, padded = tokens == MASK, tokens == PAD
    # Training hid 0.15 · 0.8 of the residues behind <mask>, embedded as zeros: rows are scaled to that share.
    scale = (1 - 0.15 * 0.8) / (1 - float(masked.sum() / (~padded).sum()))
    return np.where((masked | padded)[:, None], 0, weight[tokens] * scale)


def transformer_layer(
    x: Array, tokens: Array, rotary: Block, attention_norm: Block, qkv: Block, out_proj: Block, **ffn: Block
) -> tuple[Array, Array]:  # (L, D), (L,) -> (L, D), (H, L, L)
    context, attention = self_attention(linear(layer_norm(x, **attention_norm), **qkv), tokens, **rotary)
    x = x + linear(context, **out_proj)
    return x + feed_forward(x, **ffn), attention


def self_attention(qkv: Array, tokens: Array, frequencies: Array) -> tuple[Array, Array]:
    length, channels = len(qkv), 2 * len(frequencies)  # (L, 3·D), (L,), (C / 2,) -> (L, D), (H, L, L)
    q, k, v = qkv.reshape(length, 3, -1, channels).transpose(1, 2, 0, 3)  # each (H, L, C)
    scores = rotate(q, frequencies) @ rotate(k, frequencies).swapaxes(1, 2) * channels**-0.5  # (H, L, L)
    attention = softmax(np.where(tokens == PAD, -np.inf, scores))
    return (attention @ v).swapaxes(0, 1).reshape(length, -1), attention


def rotate(x: Array, frequencies: Array) -> Array:  # (H, L, C), (C / 2,) -> (H, L, C)
    angle = np.arange(x.shape[1])[:, None] * frequencies  # (L, C / 2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def feed_forward(x: Array, ffn_norm: Block, fc1: Block, fc2: Block) -> Array:  # (L, D) -> (L, D)
    return linear(gelu(linear(layer_norm(x, **ffn_norm), **fc1)), **fc2)


def contact_features(attention: Array, tokens: Array) -> Array:  # (H, L, L), (L,) -> (H, L - 2, L - 2)
    kept = (tokens != EOS) & (tokens != PAD)
    maps = np.where(kept & kept[:, None], attention, 0)[:, 1:-1, 1:-1]
    maps = maps + maps.swapaxes(1, 2)
    rows, columns = maps.sum(axis=2, keepdims=True), maps.sum(axis=1, keepdims=True)
    return maps - rows * columns / maps.sum(axis=(1, 2), keepdims=True)  # average product correction


def language_model(
    x: Array, embedding: Array, dense: Block, norm: Block, bias: Array, decoder: Block | None = None
) -> Array:  # (L, D), (V, D) -> (L, V)
    vocabulary = embedding.T if decoder is None else decoder["weight"]  # (D, V); a fine-tune may untie the two
    return linear(layer_norm(gelu(linear(x, **dense)), **norm), vocabulary, bias)


def linear(x: Array, weight: Array, bias: Array) -> Array:  # (L, in), (in, out), (out,) -> (L, out)
    return x @ weight + bias


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:  # (L, D), (D,), (D,) -> (L, D)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x: Array) -> Array:
    erf = np.fromiter(map(math.erf, (x * 0.5**0.5).flat), x.dtype, x.size).reshape(x.shape)
    return x * (1 + erf) / 2


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def nested(checkpoint: Any, dtype: DTypeLike = np.float64) -> dict[str, Any]:
    """The weights of a `Checkpoint` as `forward` takes them: `layers.0.fc1.bias` at `["layers"][0]["fc1"]["bias"]`."""
    root: dict[str, Any] = {}
    for name, tensor in checkpoint.tensors.items():
        *path, last = name.split(".")
        block = root
        for key in path:
            block = block.setdefault(key, {})
        block[last] = tensor.astype(dtype)
    return root | {"layers": [root["layers"][str(number)] for number in range(len(root["layers"]))]}
