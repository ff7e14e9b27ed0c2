"""A preset that trains in a second, and the scripts under it: python tests/tiny.py train --preset tiny --out FOLDER ...

Importing this file adds the preset; run as a program it calls a script's main, so that tests can start and kill
processes.
"""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from d2c import PRESETS  # noqa: E402

SMALL = dict(width=32, multipliers=(1,), patch=4, encoder_attention=False, num_res_blocks=1, linear_skip=True)
TRAIN = dict(batch_size=8, lr=1e-3, warmup=2, decay="constant", weight_decay=0.01, grad_clip=1.0, ema=0.9,
             muon=False)
PRESETS["tiny"] = dict(
    size=16, fusion="cross",
    vq=dict(z_channels=8, codebook_size=32, code_dim=4, **SMALL), kl=dict(z_channels=4, **SMALL),
    stage1=dict(width=32, depth=1, num_heads=2, dropout=0.0),
    stage2=dict(width=32, encoder_depth=1, decoder_depth=1, num_heads=2, buffer_size=2, head_depth=1, head_width=32,
                dropout=0.0),
    train={0: dict(steps=6, **TRAIN), 1: dict(TRAIN, steps=6, muon=True), 2: dict(TRAIN, steps=6, muon=True)},
    sample=dict(cfg1=2.0, temperature1=1.0, cfg2=2.0, temperature2=1.0, steps=4, diffusion_steps=5, clip=5.0,
                batch_size=8))

if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("TINY_DTYPE") == "float64":
        import tokenizers
        torch.set_default_dtype(torch.float64)
        to_float = tokenizers.to_float
        tokenizers.to_float = lambda images: to_float(images).double()
    __import__(sys.argv[1]).main(sys.argv[2:])
