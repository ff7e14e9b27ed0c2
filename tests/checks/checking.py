"""What the checks share: comparisons whose failures say what differs and what it looks like.

A check is a function of one argument `s`, whose attributes are the graded modules (s.d2c, s.fusion, s.tokenizers,
s.train, s.fid, s.adapters). It raises AssertionError with a hint of one or two lines, never with the expected numbers.
"""
import json
from pathlib import Path

import numpy as np
import torch

GOLDENS = Path(__file__).parent.parent / "goldens"
# All are read at once, by the grader itself: what a student's code does to files does not matter then.
ARRAYS = {path.stem: dict(np.load(path, allow_pickle=False)) for path in GOLDENS.glob("*.npz")}
FACTS = {path.stem: json.loads(path.read_text()) for path in GOLDENS.glob("*.json")}


def golden(name):
    """The arrays of a golden file, as tensors."""
    return {key: torch.from_numpy(value) for key, value in ARRAYS[name].items()}


def shapes(name):
    """{key: shape} of a published state dict."""
    return {key: shape for key, (shape, _) in FACTS[name]["tensors"].items()}


def same(found, expected, what, axes=(), atol=1e-5, rtol=1e-4, wrong=None):
    """Raise AssertionError, with a hint, unless two arrays agree. `axes`: names of their axes. `wrong`: {what a mistake
    looks like: the array (or a function that makes it) that the mistake gives}."""
    assert found is not None, f"{what}: is None"
    found, expected = (torch.as_tensor(x).detach() for x in (found, expected))
    assert found.shape == expected.shape, (f"{what}: has shape {tuple(found.shape)}, should have "
                                           f"{tuple(expected.shape)}" + (f" ({', '.join(axes)})" if axes else ""))
    assert found.is_floating_point() == expected.is_floating_point(), f"{what}: has dtype {found.dtype}"
    found, expected = found.double(), expected.double()
    if torch.allclose(found, expected, rtol, atol, equal_nan=False):
        return
    for name, other in (wrong or {}).items():
        other = torch.as_tensor(other() if callable(other) else other).detach().double()
        if other.shape == found.shape and torch.allclose(found, other, max(rtol, 1e-4), max(atol, 1e-5)):
            raise AssertionError(f"{what}: {name}")
    raise AssertionError(f"{what}: {likeness(found, expected, atol, rtol)}{where(found, expected, axes, atol, rtol)}")


def likeness(found, expected, atol, rtol):
    """What a wrong array looks like, if it looks like anything."""
    if not found.isfinite().all():
        return "holds numbers that are not finite"
    if not found.any():
        return "is zero everywhere"
    for sign, text in ((-1, "has the wrong sign"),):
        if torch.allclose(sign * found, expected, rtol, atol):
            return text
    big = expected.abs() > 10 * atol + 1e-3 * expected.abs().max()
    if big.sum() > 2:
        ratio = found[big] / expected[big]
        if abs(float(ratio.mean()) - 1) > 1e-3 and float(ratio.std()) < 1e-3 * abs(float(ratio.mean())):
            return f"is {float(ratio.mean()):.4g} times what it should be, everywhere"
        shift = (found - expected).flatten()
        if abs(float(shift.mean())) > 10 * atol and float(shift.std()) < 1e-3 * abs(float(shift.mean())):
            return f"is off by {float(shift.mean()):.4g} everywhere"
    if torch.allclose(found.flatten().sort().values, expected.flatten().sort().values, rtol, atol):
        return "has the right numbers in another order"
    return "differs"


def where(found, expected, axes, atol, rtol):
    """Along which axis two arrays differ, and the first place."""
    bad = ~torch.isclose(found, expected, rtol, atol)
    text = f" ({int(bad.sum())} of {bad.numel()} numbers"
    if found.ndim:
        first = bad.nonzero()[0].tolist()
        names = list(axes) + [f"axis {i}" for i in range(len(axes), found.ndim)]
        text += "; the first at " + ", ".join(f"{name} {i}" for name, i in zip(names, first))
        for dim, name in enumerate(names):
            rows = bad.movedim(dim, 0).flatten(1).any(1) if found.ndim > 1 else bad
            if 0 < int(rows.sum()) <= rows.numel() // 2:
                text += f"; only {name} {', '.join(map(str, rows.nonzero().flatten().tolist()[:6]))}"
    return text + ")"


def true(condition, hint):
    assert bool(condition), hint


def raises(kind, function, what):
    """The call must raise this error."""
    try:
        function()
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{what}: should raise {kind.__name__}, raised {type(error).__name__}") from None
    raise AssertionError(f"{what}: should raise {kind.__name__}")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    """Standard normal numbers from a seed."""
    return torch.randn(*shape, generator=seeded(seed))
