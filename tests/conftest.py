"""One thread everywhere: sums then have one order, so that two runs can be compared bit for bit."""
import numpy as np
import pytest
import torch

import tiny  # noqa: F401  (adds the preset)
import tokenizers
import train

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """120 pictures of 16 pixels as an .npz."""
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    shapes = tokenizers.Shapes(16, count=120)
    np.savez(path, images=np.stack([shapes[i][0] for i in range(120)]), labels=np.arange(120) % 10)
    return path


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """A run folder with all three stages trained; tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(["--preset", "tiny", "--data", str(data), "--out", str(out), "--steps", "30", "--save-every", "5"])
    return out
