"""The transformer block of stage 2, and how the codes enter it: three fusion modules.

A picture is a grid of N places, each with a code and a latent (D is the model's width). Stage 2 is a masked autoencoder:
its decoder works on a sequence of S + N slots, first S buffer slots that carry the class, then one slot per place, which
holds a token of the latent where that is known and one and the same "mask token" where it is still hidden. Fusion
happens at the decoder's input, so that every hidden place can find its own code:

    discrete (B,N,D)   the embedded codes, plus the decoder's position embedding of their places
    context  = fusion.prepare(discrete)         once per image when sampling
    sequence = fusion(sequence, context)        (B,S+N,D) -> (B,S+N,D), before the decoder's first block

    cross      the sequence asks, the codes answer: blocks of cross-attention and MLP. What it asks depends on what is
               already drawn, so it runs at every step; keys and values of the codes are computed once.
    qformer    learned queries, one per slot, ask instead: blocks of self-attention, cross-attention and MLP (Q-Former:
               Li et al. 2023, BLIP-2, arXiv 2301.12597). They never see the sequence, so they run once per image, and
               the result is added.
    aligned    one linear map: code i is added to the slot of place i. No attention; it shows what the others are worth.

The D2C paper proposes the first two kinds; their exact place is not in the text known to us and is our choice. All that a
module adds passes through projections that start at zero, so a fresh one changes nothing: a model started from published
MAR weights begins exactly as MAR and learns to look at the codes.
"""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F


@torch.library.custom_op("d2c::onednn_linear", mutates_args=())  # torch.compile would refuse the bare operator
def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@onednn_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """nn.Linear. Where torch would ask MKL (on x86 CPUs), large layers without gradients ask oneDNN, which such a torch has too:
    it is faster, above all with few rows, as in a step of sampling."""

    KNOWN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()

    def forward(self, x):
        if (self.KNOWN and x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and self.weight.numel() >= 2**18
                and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")):
            return onednn_linear(x, self.weight, self.bias)
        return super().forward(x)


def layer_norm(width):
    return nn.LayerNorm(width, eps=1e-6)


def init_linear(module):
    """MAR's initialisation, for `module.apply`: xavier-uniform weights and zero biases in linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def zero(*layers):
    """Start linear layers at zero."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def pick(x, places):
    """The rows `places` (B,R) of x (B or 1,T,D) -> (B,R,D)."""
    return x.expand(len(places), -1, -1).gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def split_heads(x, heads):
    """(B,T,D) -> (B,heads,T,D/heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over a whole sequence (B,T,D), names of timm's ViT; with `slots` (B,R) only these ask."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x, slots=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)                                                # (B,T,D) each
        if slots is not None:
            q = pick(q, slots)                                                                # (B,R,D)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))                       # (B,heads,T or R,D/heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)   # (B,T or R,D)


class CrossAttention(nn.Module):
    """A sequence (B or 1,T,D) attends to the discrete tokens, given as their keys and values."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def keys_values(self, discrete):
        """(B,N,D) -> keys and values, (B,heads,N,D/heads) each."""
        return tuple(split_heads(part, self.heads) for part in self.kv(discrete).chunk(2, dim=-1))

    def forward(self, x, keys_values):
        q = split_heads(self.q(x), self.heads).expand(len(keys_values[0]), -1, -1, -1)        # (B,heads,T,D/heads)
        x = F.scaled_dot_product_attention(q, *keys_values, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)   # (B,T,D)


class Mlp(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)                       # (B,T,4D)
        return F.dropout(self.fc2(x), self.dropout, self.training)                            # (B,T,D)


class Block(nn.Module):
    """The pre-norm transformer block of ViT and MAE, (B,T,D) -> (B,T,D), with MAR's parameter names; `cross=True` puts
    cross-attention between its two halves (the Q-Former's block). With `slots` (B,R) only these are computed: (B,R,D)."""

    def __init__(self, width, heads, dropout=0.0, cross=False):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, heads, dropout)
        if cross:
            self.norm_cross = layer_norm(width)
            self.cross = CrossAttention(width, heads, dropout)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, dropout)

    def forward(self, x, keys_values=None, slots=None):
        x = (x if slots is None else pick(x, slots)) + self.attn(self.norm1(x), slots)
        if keys_values is not None:
            x = x + self.cross(self.norm_cross(x), keys_values)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Cross-attention and MLP. No self-attention: the decoder that follows has plenty."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.cross = CrossAttention(width, heads, dropout)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, dropout)

    def forward(self, x, keys_values):
        x = x + self.cross(self.norm1(x), keys_values)
        return x + self.mlp(self.norm2(x))


class CrossAttentionFusion(nn.Module):
    """Every slot looks at the codes. context: their keys and values, a pair per block."""

    def __init__(self, width, heads, depth=2, dropout=0.0):
        super().__init__()
        self.norm_discrete = layer_norm(width)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, dropout) for _ in range(depth))
        self.apply(init_linear)
        zero(*(layer for block in self.blocks for layer in (block.cross.proj, block.mlp.fc2)))

    def prepare(self, discrete):
        discrete = self.norm_discrete(discrete)
        return [block.cross.keys_values(discrete) for block in self.blocks]

    def forward(self, sequence, context):
        for block, keys_values in zip(self.blocks, context):
            sequence = block(sequence, keys_values)
        return sequence


class QFormerFusion(nn.Module):
    """Learned queries look at the codes in the slots' stead. context: the finished queries (B,S+N,D), to be added.
    Unlike BLIP-2's few queries, a bottleneck, there is one per slot: each hidden place wants its own answer."""

    def __init__(self, width, heads, length, depth=2, dropout=0.0):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, length, width))  # d2c.py starts them on the decoder's positions
        self.norm_discrete = layer_norm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, cross=True) for _ in range(depth))
        self.norm = layer_norm(width)
        self.out = nn.Linear(width, width)
        self.apply(init_linear)
        zero(self.out)

    def prepare(self, discrete):
        discrete = self.norm_discrete(discrete)
        queries = self.queries  # the same for all pictures until they meet the codes: one run of the first self-attention (and one dropout) does
        for block in self.blocks:
            queries = block(queries, block.cross.keys_values(discrete))                       # (B,S+N,D)
        return self.out(self.norm(queries))

    def forward(self, sequence, context):
        return sequence + context


class AlignedFusion(nn.Module):
    """Each place gets its own code. context: the mapped codes (B,S+N,D), zero at the buffer slots, to be added.
    Close to DC-Mix of MixAR (arXiv 2511.12181), which puts codes where mask tokens would be."""

    def __init__(self, width, length):
        super().__init__()
        self.length = length
        self.norm_discrete = layer_norm(width)
        self.out = nn.Linear(width, width)
        zero(self.out)

    def prepare(self, discrete):
        return F.pad(self.out(self.norm_discrete(discrete)), (0, 0, self.length - discrete.shape[1], 0))   # (B,S+N,D)

    def forward(self, sequence, context):
        return sequence + context


def make_fusion(kind, width, heads, length, depth=2, dropout=0.0):
    """The module called `kind` (cross, qformer, aligned) for sequences of `length` = S + N slots. Raises ValueError for
    another kind."""
    if kind == "cross":
        return CrossAttentionFusion(width, heads, depth, dropout)
    if kind == "qformer":
        return QFormerFusion(width, heads, length, depth, dropout)
    if kind == "aligned":
        return AlignedFusion(width, length)
    raise ValueError(f"unknown fusion {kind!r}: choose cross, qformer or aligned")
