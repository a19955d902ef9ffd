"""GPT-2 with a cross-attention block in each of its layers, pre-norm with residuals:

    h = h + SelfAttention(LN_1(h))
    h = h + CrossAttention(q=LN_cross(h), kv=LN_visual(features))   output projection starts at zero
    h = h + MLP(LN_2(h))

The modules carry the names of transformers' GPT-2, so its weights load unchanged.

An image has several rows of tokens: its captions in training, its beams or samples in decoding.
Cross-attention has no mask, so the rows of an image are one long query, and its keys and values are
computed once and shared without a copy.

Shapes: B images, N rows per image, T tokens, S visual tokens, D decoder width, E vision width, H
heads, K head width.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

CrossCache = list[Tensor]
"""For each layer the keys and values of the visual tokens, [B, 2, H, S, K]."""


@dataclass(frozen=True)
class PackedLayout:
    """Several sequences in one row of tokens: each starts at position 0 and sees itself alone."""

    positions: Tensor
    """Position of each token in its own sequence, int64 [B, T]."""
    mask: Tensor
    """What each token sees, 0, and not, -inf: [B, 1, T, T] in the dtype of the attention, whose
    kernels would convert a bool mask in each layer."""


class KVCache:
    """Keys and values of the tokens so far, one [B, 2, H, max_tokens * N, K] buffer a layer.

    The N rows of an image lie side by side at each token. Keys and values stay in the slot in which
    they were written: when a beam continues another one, only `slots` changes. Adding a token asks
    the device for no value, and all tensors stay where they are, so that a CUDA graph can replay
    it.

    Attributes:
        position: tokens so far, int64 [1].
        slots: the slot of each row's past tokens, int64 [B, N, max_tokens]; -1: none yet.
        mask: 0 for the entries that each row sees and -inf for the others, [B, 1, N, entries]; None
            if there are no others.
    """

    ALIGNMENT = 8
    """Entries of a mask's row, of which attention's kernels want a multiple."""

    def __init__(
        self, config: GPT2Config, batch: int, rows: int, max_tokens: int, like: Tensor
    ) -> None:
        tokens = -(-max_tokens // self.ALIGNMENT) * self.ALIGNMENT
        shape = (batch, 2, config.n_head, tokens * rows, config.n_embd // config.n_head)
        self.layers = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.slots = self.position.new_full((batch, rows, tokens), -1)
        self.rows = torch.arange(rows, device=like.device)
        self.mask: Tensor | None = None

    def clear(self) -> None:
        """Forget all tokens."""
        self.position.zero_()
        self.slots.fill_(-1)

    def first(self, batch: int) -> Self:
        """Return the cache of the first images, which shares all memory with this one."""
        part = copy.copy(self)
        part.layers = [layer[:batch] for layer in self.layers]
        part.slots = self.slots[:batch]
        return part

    def extend(self, window: int | None) -> None:
        """Add a token to each row, whose keys and values each layer then passes to `update`.

        Args:
            window: number of tokens that there are with it, if known; None: rows see as many
                entries as there are, under a mask.
        """
        self.slots.index_copy_(2, self.position, self.rows.expand(len(self.slots), -1)[..., None])
        self.new = self.position * len(self.rows) + self.rows
        self.position += 1
        self.entries = (window or self.slots.shape[2]) * len(self.rows)
        self.mask = None
        if window is None or len(self.rows) > 1:
            visible = self.slots[:, :, :window, None] == self.rows
            self.mask = torch.zeros_like(visible, dtype=self.layers[0].dtype)
            self.mask = self.mask.masked_fill_(~visible, -torch.inf).flatten(2).unsqueeze(1)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, N, K] of the newest token; return those of all tokens."""
        for buffer, new in zip(self.layers[layer].unbind(1), (key, value), strict=True):
            buffer.index_copy_(2, self.new, new)
        keys, values = self.layers[layer][:, :, :, : self.entries].unbind(1)
        return keys, values

    def reorder(self, parents: Tensor) -> None:
        """Let each row continue the row `parents`, int64 [B, N], of its image."""
        self.slots.copy_(self.slots.gather(1, parents.unsqueeze(-1).expand_as(self.slots)))


def residual_projection(config: GPT2Config, width: int) -> Conv1D:
    """Return a projection into the residual stream, initialised as in section 2.3 of GPT-2's paper:
    its standard deviation is scaled by depth."""
    projection = Conv1D(config.n_embd, width)
    projection.init_std = config.initializer_range / (2 * config.n_layer) ** 0.5
    return projection


class SelfAttention(nn.Module):
    """GPT-2's causal self-attention."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = config.n_head, layer
        self.scale = None if config.scale_attn_weights else 1.0
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = residual_projection(config, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        """Attend within each row.

        Args:
            x: [B, N, T, D]; with a cache T is 1, with a mask N is 1.
            cache: of the tokens before, while decoding.
            mask: of a `PackedLayout`; None: all tokens before it and itself.
        """
        B, N, T, D = x.shape
        sequences, length = (B * N, T) if cache is None else (B, N)
        q, k, v = self.c_attn(x).view(sequences, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        causal = cache is None and mask is None
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            mask = cache.mask
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
        return self.c_proj(out.transpose(1, 2).reshape(B, N, T, D))


class CrossAttention(nn.Module):
    """GPT-2's attention from text to visual tokens, without a mask."""

    def __init__(self, config: GPT2Config, visual_width: int) -> None:
        super().__init__()
        self.heads = config.n_head
        self.scale = None if config.scale_attn_weights else 1.0
        self.q_attn = Conv1D(config.n_embd, config.n_embd)
        self.c_attn = Conv1D(2 * config.n_embd, visual_width)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.init_std = 0.0  # the untrained captioner is GPT-2 exactly

    def key_value_projection(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return the matrix [E, 2D] and bias [2D] from visual tokens of mean 0 and variance 1 to
        keys and values, with the norm's scale and shift."""
        weight = norm.weight.unsqueeze(1) * self.c_attn.weight
        return weight, self.c_attn.bias + (norm.bias.unsqueeze(1) * self.c_attn.weight).sum(0)

    def keys_values(self, visual: Tensor, norm: nn.LayerNorm, out: Tensor | None = None) -> Tensor:
        """Project visual tokens to keys and values, [B, 2, H, S, K].

        The norm's scale and shift are taken into the projection: a product of weights instead of
        one of activations. So all layers share one normalised input, and its gradient, which a
        frozen tower does not need, is not computed for those of the scale and shift.

        Args:
            visual: [B, S, E], normalised to mean 0 and variance 1.
            norm: whose scale and shift follow.
            out: where they are written; None: new memory.
        """
        B, S, _ = visual.shape
        weight, bias = self.key_value_projection(norm)
        projected = F.linear(visual, weight.t(), bias).view(B, S, 2, self.heads, -1)
        # They are read again for each token: on a CPU a copy makes that five times as fast.
        projected = projected.permute(0, 2, 3, 1, 4)
        return projected.contiguous() if out is None else out.copy_(projected)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """Let all rows of an image attend to it: [B, N, T, D] to [B, N, T, D]."""
        B, N, T, D = x.shape
        q = self.q_attn(x).view(B, N * T, self.heads, -1).transpose(1, 2)
        keys, values = keys_values.unbind(1)
        out = F.scaled_dot_product_attention(q, keys, values, scale=self.scale)
        return self.c_proj(out.transpose(1, 2).reshape(B, N, T, D))

    def weights(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """Return the attention of each token [B, N, T, D] over the visual tokens, the mean of the
        heads: float32 [B, N, T, S]."""
        B, N, T, _ = x.shape
        q = self.q_attn(x).view(B, N * T, self.heads, -1).transpose(1, 2).float()
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = q @ keys_values[:, 0].float().transpose(2, 3) * scale
        return scores.softmax(-1).mean(1).view(B, N, T, -1)


class MLP(nn.Module):
    """GPT-2's feed-forward block."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(width, config.n_embd)
        self.c_proj = residual_projection(config, width)
        # GPT-2's gelu_new is gelu's tanh approximation, for which torch has one fused kernel.
        fused = config.activation_function == "gelu_new"
        self.act = nn.GELU(approximate="tanh") if fused else ACT2FN[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """One decoder layer: self-attention, cross-attention and feed-forward."""

    def __init__(self, config: GPT2Config, layer: int, visual_width: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=config.layer_norm_epsilon)
        self.ln_1 = norm(config.n_embd)
        self.attn = SelfAttention(config, layer)
        self.ln_cross_attn = norm(config.n_embd)
        self.ln_visual = norm(visual_width)
        self.crossattention = CrossAttention(config, visual_width)
        self.ln_2 = norm(config.n_embd)
        self.mlp = MLP(config)
        # Of the trained branches; training sets its probability.
        self.dropout = nn.Dropout(0.0)

    def forward(
        self, h: Tensor, visual: Tensor, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        h = h + self.attn(self.ln_1(h), cache, mask)
        h = h + self.dropout(self.crossattention(self.ln_cross_attn(h), visual))
        return h + self.dropout(self.mlp(self.ln_2(h)))


class Decoder(nn.Module):
    """GPT-2 with cross-attention, up to and including the last norm."""

    def __init__(self, config: GPT2Config, visual_width: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(
            Block(config, layer, visual_width) for layer in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.visual_eps = config.layer_norm_epsilon
        self.recompute = False
        """Compute each layer again in the backward pass instead of keeping its activations."""

    @property
    def blocks(self) -> Iterable[Block]:
        """The layers, in order."""
        return cast(Iterable[Block], self.h)

    def cross_cache(self, features: Tensor, out: CrossCache | None = None) -> CrossCache:
        """Return each layer's keys and values of the visual tokens [B, S, E], written to `out` if
        that is given."""
        with torch.autocast(features.device.type, enabled=False):  # its result would be float32
            visual = F.layer_norm(features, features.shape[-1:], eps=self.visual_eps)
        return [
            block.crossattention.keys_values(visual, block.ln_visual, buffer)
            for block, buffer in zip(self.blocks, out or repeat(None), strict=False)
        ]

    def forward(
        self,
        tokens: Tensor,
        visual: CrossCache,
        cache: KVCache | None = None,
        layout: PackedLayout | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Return the last hidden states [B, N, T, D].

        Args:
            tokens: ids, int64 [B, N, T]; with a cache T is 1, with a layout N is 1.
            visual: as `cross_cache` returns it.
            cache: of the tokens before, while decoding.
            layout: of several sequences in a row.
            window: see `KVCache.extend`.
        """
        mask = None
        if layout is not None:
            positions, mask = layout.positions.unsqueeze(1), layout.mask
        elif cache is not None:
            positions = cache.position.clone()
            cache.extend(window)
        else:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        h = self.wte(tokens) + self.wpe(positions)
        for block, keys_values in zip(self.blocks, visual, strict=True):
            if cache is not None:
                # Not `block(…)`, which may be compiled: the shapes change with each token.
                h = block.forward(h, keys_values, cache, mask)
            elif self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, keys_values, cache, mask, use_reentrant=False)
            else:
                h = block(h, keys_values, cache, mask)
        return self.ln_f(h)
