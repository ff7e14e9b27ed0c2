"""How the codes enter stage 2: three fusion modules. Below them: the attention layers and the transformer block.

A picture is a grid of N places. Each place has a code (what stage 1 sampled) and a latent (what stage 2 is to sample).
Stage 2 is a masked autoencoder of width D. Its decoder works on S + N slots: S buffer slots, all fed the class, which
give it room to work in; then one slot per place, which holds the encoder's token where the latent is known, and one
learned "mask token" where it is hidden. Fusion happens at the decoder's input. There the sequence and the codes have
the same position vectors added at the same places, and by these a hidden place finds its own code:

    discrete (B,N,D)   the embedded codes, with the position vectors of their places added
    context  = fusion.prepare(discrete)         once per image when sampling
    sequence = fusion(sequence, context)        (B,S+N,D) -> (B,S+N,D), positions included, before the first block

    cross      The sequence asks, the codes answer: blocks of cross-attention and an MLP. What the sequence asks depends
               on what is already drawn, so this runs at every token step; keys and values are prepared once.
    qformer    Learned queries ask instead, one per slot: blocks of self-attention, cross-attention and an MLP (BLIP-2,
               arXiv 2301.12597). They never see the sequence, so they run once per image, and are then added to it.
    aligned    One linear map adds the code of place i to the slot of place i: the baseline without attention.

The D2C paper proposes the first two. We do not know where exactly it puts them; the decoder's input is our choice.
Everything that a module adds passes through layers that start at zero, so a fresh module changes nothing: a
model that starts from published MAR weights begins exactly as MAR and learns to look at the codes.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

# Fusion --------------------------------------------------------------------------------------------------------------

class FusionBlock(nn.Module):
    """Cross-attention to the codes, then an MLP; the Q-Former's block has self-attention before both."""
    def __init__(self, width, heads, dropout=0.0, self_attention=False):
        super().__init__()
        parts = [layer_norm(width), SelfAttention(width, heads, dropout)] if self_attention else []
        self.self_attention = nn.Sequential(*parts)
        self.norm_cross = layer_norm(width)
        self.cross = CrossAttention(width, heads, dropout)
        self.norm_mlp = layer_norm(width)
        self.mlp = Mlp(width, dropout)

    def forward(self, x, keys_values):
        """x (B,T,D), or (1,T,D) if all pictures share it; keys_values from self.cross.keys_values -> (B,T,D)."""
        if self.self_attention:
            x = x + self.self_attention(x)
        x = x + self.cross(self.norm_cross(x), keys_values)                                   # (B,T,D)
        return x + self.mlp(self.norm_mlp(x))

class CrossAttentionFusion(nn.Module):
    """Every slot of the sequence looks at the codes. No self-attention: the decoder that follows has plenty."""
    def __init__(self, width, heads, depth=2, dropout=0.0):
        super().__init__()
        self.norm_discrete = layer_norm(width)
        self.blocks = nn.ModuleList(FusionBlock(width, heads, dropout) for _ in range(depth))
        self.apply(init_linear)
        zero(*(layer for block in self.blocks for layer in (block.cross.proj, block.mlp.fc2)))

    def prepare(self, discrete):
        """discrete (B,N,D) -> context: a list, for each block its own keys and values of the normalised codes."""
        discrete = self.norm_discrete(discrete)
        return [block.cross.keys_values(discrete) for block in self.blocks]

    def forward(self, sequence, context):
        for block, keys_values in zip(self.blocks, context):
            sequence = block(sequence, keys_values)
        return sequence

class QFormerFusion(nn.Module):
    """Learned queries, one per slot, look at the codes and are added to the sequence (BLIP-2 has few: a bottleneck)."""
    def __init__(self, width, heads, length, depth=2, dropout=0.0):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, length, width))  # d2c.py fills in positions, else all were alike
        self.norm_discrete = layer_norm(width)
        self.blocks = nn.ModuleList(FusionBlock(width, heads, dropout, self_attention=True) for _ in range(depth))
        self.norm = layer_norm(width)
        self.out = nn.Linear(width, width)
        self.apply(init_linear)
        zero(self.out)

    def prepare(self, discrete):
        """discrete (B,N,D) -> context: the queries (B,S+N,D) after all blocks, each of which sees the normalised codes,
        and then through `norm` and `out`."""
        discrete = self.norm_discrete(discrete)
        queries = self.queries  # (1,S+N,D): all pictures share the first self-attention, before any code is seen
        for block in self.blocks:
            queries = block(queries, block.cross.keys_values(discrete))                       # (B,S+N,D)
        return self.out(self.norm(queries))

    def forward(self, sequence, context):
        return sequence + context

class AlignedFusion(nn.Module):
    """Each place gets its own code and no other. (DC-Mix of MixAR, arXiv 2511.12181, replaces mask tokens instead.)"""
    def __init__(self, width, length):
        super().__init__()
        self.length = length
        self.norm_discrete = layer_norm(width)
        self.out = nn.Linear(width, width)
        zero(self.out)

    def prepare(self, discrete):
        """discrete (B,N,D) -> context (B,S+N,D): S = length - N slots of zeros, then the codes, normed and mapped."""
        return F.pad(self.out(self.norm_discrete(discrete)), (0, 0, self.length - discrete.shape[1], 0))  # S in front

    def forward(self, sequence, context):
        return sequence + context

def make_fusion(kind, width, heads, length, depth=2, dropout=0.0):
    """The module called `kind` (cross, qformer or aligned, else ValueError) for sequences of `length` = S + N slots."""
    if kind == "cross":
        return CrossAttentionFusion(width, heads, depth, dropout)
    if kind == "qformer":
        return QFormerFusion(width, heads, length, depth, dropout)
    if kind == "aligned":
        return AlignedFusion(width, length)
    raise ValueError(f"unknown fusion {kind!r}: choose cross, qformer or aligned")

# The transformer block -----------------------------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """Multi-head self-attention over a whole sequence, (B,T,D) -> (B,T,D); parameter names of timm's ViT, as in MAR."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))    # (B,heads,T,D/heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)  # (B,T,D)

class CrossAttention(nn.Module):
    """A sequence attends to the codes: softmax(q k^T / sqrt(D/heads)) v, with q a linear map of the sequence, k and v
    linear maps of the codes, and heads that are consecutive parts of the width. Joined again they pass `proj`. In
    training, dropout acts on the attention weights and on the result."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, discrete):
        """(B,N,D) -> keys and values, (B,heads,N,D/heads) each."""
        return tuple(split_heads(part, self.heads) for part in self.kv(discrete).chunk(2, dim=-1))

    def forward(self, x, keys_values):
        """x (B,T,D), or (1,T,D) if all pictures share it; keys and values (B,heads,N,D/heads) -> (B,T,D)."""
        q = split_heads(self.q(x), self.heads).expand(len(keys_values[0]), -1, -1, -1)        # (B,heads,T,D/heads)
        x = F.scaled_dot_product_attention(q, *keys_values, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)  # (B,T,D)

class Mlp(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)                       # (B,T,4D)
        return F.dropout(self.fc2(x), self.dropout, self.training)                            # (B,T,D)

class Block(nn.Module):
    """The pre-norm transformer block of ViT and MAE, (B,T,D) -> (B,T,D), under MAR's parameter names."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, heads, dropout)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

def split_heads(x, heads):
    """(B,T,D) -> (B,heads,T,D/heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)

def layer_norm(width):
    return nn.LayerNorm(width, eps=1e-6)  # MAR's eps

def init_linear(module):
    """MAR's initialisation, for `module.apply`: xavier-uniform weights and zero biases in linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

def zero(*layers):
    """Start linear layers at zero."""
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.zeros_(parameter)
