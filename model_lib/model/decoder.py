"""GPT-2 with a cross-attention block in each of its layers, pre-norm with residuals:

    h = h + SelfAttention(LN_1(h))
    h = h + CrossAttention(q=LN_cross(h), kv=LN_visual(features))   output projection starts at zero
    h = h + MLP(LN_2(h))

The modules carry the names of transformers' GPT-2, so its weights load unchanged.

An image owns several token rows at once (its captions in training, its beams or samples in
decoding), and cross-attention has no mask, so those rows are simply one long query: keys and values
are computed once per image and shared without a copy.

Shapes: B images, N rows per image, T tokens, S visual tokens, D decoder width, E vision width, H
heads, K head width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

CrossCache = list[tuple[Tensor, Tensor]]
"""For each layer the keys and values of the visual tokens, each [B, H, S, K]."""


@dataclass(frozen=True)
class PackedLayout:
    """Several sequences in one row of tokens: each starts at position 0 and sees itself alone."""

    positions: Tensor
    """Place of each token in its own sequence, int64 [B, T]."""
    mask: Tensor
    """What each token sees, bool [B, 1, T, T]."""


class KVCache:
    """Keys and values of the tokens so far, one [2, B, H, max_tokens * N, K] buffer a layer.

    The N rows of an image lie side by side at each token, and stay where they were written: when a
    beam changes its parent, only `origin` changes, which says in whose place a row's past tokens
    lie.
    """

    def __init__(
        self, config: GPT2Config, batch: int, rows: int, max_tokens: int, like: Tensor
    ) -> None:
        shape = (2, batch, config.n_head, max_tokens * rows, config.n_embd // config.n_head)
        self.layers = [like.new_empty(shape) for _ in range(config.n_layer)]
        self.own = torch.arange(rows, device=like.device).view(1, rows, 1).expand(batch, rows, 1)
        self.origin = self.own[:, :, :0]
        self.mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.origin.shape[2]

    def extend(self) -> None:
        """Make room for a token of each row, and let each row see its own past: bool [B, 1, N,
        tokens * N]."""
        self.origin = torch.cat([self.origin, self.own], 2)
        if self.own.shape[1] > 1:
            visible = self.origin.unsqueeze(-1) == self.own.transpose(1, 2).unsqueeze(2)
            self.mask = visible.flatten(2).unsqueeze(1)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, N, K] of the newest token; return those of all tokens so
        far."""
        end = self.length * key.shape[2]
        self.layers[layer][0, :, :, end - key.shape[2] : end] = key
        self.layers[layer][1, :, :, end - key.shape[2] : end] = value
        return self.layers[layer][0, :, :, :end], self.layers[layer][1, :, :, :end]

    def reorder(self, parents: Tensor) -> None:
        """Let each row go on from the row `parents`, int64 [B, N], of its image."""
        self.origin = self.origin.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.length))

    def keep_batch(self, images: Tensor) -> None:
        """Go on with some of the images, int64 [B'], in this order."""
        self.layers = [layer.index_select(1, images) for layer in self.layers]
        self.own, self.origin = self.own[images], self.origin[images]


def residual_projection(config: GPT2Config, width: int) -> Conv1D:
    """Return a projection into the residual stream, its spread scaled by depth (GPT-2 paper,
    section 2.3)."""
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
        """Attend within each row: [B, N, T, D] to [B, N, T, D]; with a cache T is 1, with a mask N
        is 1."""
        B, N, T, D = x.shape
        sequences, length = (B * N, T) if cache is None else (B, N)
        q, k, v = self.c_attn(x).view(sequences, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is None:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=self.scale
            )
        else:
            k, v = cache.append(self.layer, k, v)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask, scale=self.scale)
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
        self.c_proj.init_std = 0.0  # so that the untrained captioner is GPT-2 exactly

    def keys_values(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Project normalised visual tokens [B, S, E] to keys and values, each [B, H, S, K]."""
        B, S, _ = visual.shape
        # Contiguous: read again for each token, they are worth a copy (five times on a CPU, one row
        # per image).
        key, value = (
            self.c_attn(visual).view(B, S, 2, self.heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        )
        return key, value

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """Let all rows of an image attend to it: [B, N, T, D] to [B, N, T, D]."""
        B, N, T, D = x.shape
        q = self.q_attn(x).view(B, N * T, self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, *keys_values, scale=self.scale)
        return self.c_proj(out.transpose(1, 2).reshape(B, N, T, D))

    def weights(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """Return how much each token [B, N, T, D] attends to each visual token: float32 [B, N, T,
        S], mean of heads."""
        B, N, T, _ = x.shape
        q = self.q_attn(x).view(B, N * T, self.heads, -1).transpose(1, 2).float()
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = q @ keys_values[0].float().transpose(2, 3) * scale
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
    """One decoder layer: self-attention, cross-attention, feed-forward, each pre-norm with a
    residual."""

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
        self.dropout = nn.Dropout(0.0)  # of the trained branches; training sets it

    def forward(
        self, h: Tensor, visual: tuple[Tensor, Tensor], cache: KVCache | None, mask: Tensor | None
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
        self.recompute = False
        """Compute each layer again in the backward pass instead of keeping what it computed."""

    @property
    def blocks(self) -> Iterable[Block]:
        """The layers, in order."""
        return cast(Iterable[Block], self.h)

    def forward(
        self, tokens: Tensor, visual: CrossCache, cache: KVCache | None, layout: PackedLayout | None
    ) -> Tensor:
        if layout is not None:
            positions, mask = layout.positions.unsqueeze(1), layout.mask
        else:
            start = 0
            if cache is not None:
                start = cache.length
                cache.extend()
            positions, mask = (
                torch.arange(start, start + tokens.shape[-1], device=tokens.device),
                None,
            )
        h = self.wte(tokens) + self.wpe(positions)
        for block, keys_values in zip(self.blocks, visual, strict=True):
            if cache is not None:
                h = block.forward(
                    h, keys_values, cache, mask
                )  # not compiled: its shapes are others at each token
            elif self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, keys_values, cache, mask, use_reentrant=False)
            else:
                h = block(h, keys_values, cache, mask)
        return self.ln_f(h)
