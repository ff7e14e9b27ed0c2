"""Weights from a formula, so that golden outputs of big published models need no weight file.

Every tensor is filled with normal numbers from a generator seeded by its name, then brought to a scale at which
signals neither die nor explode.  The golden files in `goldens/` were made by the original code with these weights, so
the rule must not change by a bit: PCG64 seeded by crc32 of the key, float32 throughout.
"""
import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch


def formula_state(shapes, conv_gain=1.0):
    """{key: shape} -> {key: float32 tensor}, without the counters `num_batches_tracked`.

    `conv_gain` multiplies 4-D tensors: sqrt(2) makes up for the half of the signal that each ReLU removes.
    """
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            continue
        shape = tuple(shape)
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
        noise = generator.standard_normal(math.prod(shape), dtype=np.float32).reshape(shape)
        gain = conv_gain if len(shape) == 4 else 1.0
        if key.endswith("running_var"):
            value = 1 + np.float32(0.1) * np.abs(noise)
        elif len(shape) >= 3 and shape[0] == 1:  # learned positions and mask tokens
            value = np.float32(0.02) * noise
        elif len(shape) >= 2:
            value = np.float32(gain / math.sqrt(math.prod(shape[1:]))) * noise  # 1 / sqrt(fan in)
        elif key.endswith("weight"):  # scales of normalisation layers
            value = 1 + np.float32(0.1) * noise
        else:  # biases and running means
            value = np.float32(0.1) * noise
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def published_file(name, path, *containers):
    """A weight file in the form of a published one: formula weights for the key list `name` of `goldens/`, in a dict
    under each of `containers`, beside training arguments as their authors store them. Returns the path as text."""
    tensors = json.loads((Path(__file__).parent / "goldens" / f"{name}.json").read_text())["tensors"]
    state = formula_state({key: shape for key, (shape, _) in tensors.items()})
    torch.save({container: state for container in containers} | {"args": argparse.Namespace(lr=1e-4)}, path)
    return str(path)
