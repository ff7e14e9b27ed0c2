"""Exercise 10: statistics, the Frechet distance, precision and recall, the Inception Score."""
import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checking import FACTS, golden, normal, same, true

FLOAT32 = "is exact only to the digits of float32: compute in float64"

# Statistics ----------------------------------------------------------------------------------------------------------


def same_statistics(s, x, what):
    """Compare mean and covariance with numpy's, to the digits of float64."""
    before = x.clone()
    found = s.fid.statistics(x)
    true(isinstance(found, tuple) and len(found) == 2, f"{what}: should give a pair, mean and covariance")
    for name, array in zip(("mean", "covariance"), found):
        true(isinstance(array, np.ndarray) and array.dtype == np.float64, f"{what}, {name}: should be a float64 numpy "
             f"array, is {type(array).__name__} of {getattr(array, 'dtype', None)}")
    true(torch.equal(x, before), f"{what}: changes the features it is given")
    x = x.double().numpy()
    mu, sigma, n = x.mean(0), np.cov(x, rowvar=False), len(x)
    size = float(np.abs(sigma).max())
    wrong = {"divides by N, not by N - 1": sigma * (n - 1) / n, "is not divided by N - 1": sigma * (n - 1),
             "is the second moment: the mean is not taken off": sigma + np.outer(mu, mu) * n / (n - 1),
             "equals that of the first 1000 rows": lambda: np.cov(x[:1000], rowvar=False),
             "is the correlation, not the covariance": lambda: np.corrcoef(x, rowvar=False),
             "takes each block's own mean off, not the mean of all":
                 lambda: sum((len(rows) - 1) * np.cov(rows, rowvar=False) for rows in (x[:1000], x[1000:])) / (n - 1),
             FLOAT32: sigma}
    same(found[0], mu, f"{what}, mean", ("dimension",), 1e-9, 1e-9, {FLOAT32: mu})
    same(found[1], sigma, f"{what}, covariance", ("dimension", "dimension"), 1e-8 * size, 1e-9, wrong)


def few_rows(s):
    """Mean and covariance of seven rows, in float64; the covariance divides by N - 1"""
    same_statistics(s, normal(7, 4, seed=1) @ normal(4, 4, seed=2) + 0.5, "7 rows")
    same_statistics(s, normal(3, 5, seed=3), "3 rows of 5 numbers")
    same_statistics(s, normal(7, 4, seed=4).double() / 3, "rows in float64")


def many_rows(s):
    """Mean and covariance of 1,500 and 2,300 rows that drift; a large mean costs no digits"""
    for n in (1500, 2300):
        drift = torch.linspace(-3, 5, n)[:, None] * torch.tensor([1.0, -2.0, 0.5])
        same_statistics(s, normal(n, 3, seed=1) + drift, f"{n} rows that drift")
    same_statistics(s, 2000 + normal(1200, 3, seed=2) * torch.tensor([0.1, 1.0, 3.0]), "rows with a mean of 2000")


# The Frechet distance ------------------------------------------------------------------------------------------------


def number(*values):
    return torch.tensor([float(x) for x in values], dtype=torch.float64).squeeze()


def distance(s, *gaussians):
    found = s.fid.frechet_distance(*gaussians)
    true(isinstance(found, float), f"frechet_distance: should be a float, is {type(found).__name__}")
    return number(found)


def root(sigma):
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def same_distance(s, gaussians, trace_of_root, what, atol=1e-4):
    """Compare, given the trace of (sigma1 sigma2)^(1/2)."""
    mu1, sigma1, mu2, sigma2 = gaussians
    means, traces = np.square(mu1 - mu2).sum(), np.trace(sigma1) + np.trace(sigma2)
    value = means + traces - 2 * trace_of_root
    wrong = {"the root is not doubled": means + traces - trace_of_root,
             "equals the means' part alone": means, "the means are missing": traces - 2 * trace_of_root,
             "|mu1 - mu2| is not squared": math.sqrt(means) + traces - 2 * trace_of_root,
             "equals |mu1 - mu2|^2 + tr(sigma1 + sigma2): the root is missing": means + traces,
             "equals its square root: the distance stays squared": math.sqrt(abs(value)),
             "tr(sigma1^(1/2) sigma2^(1/2)) is another number, unless they commute":
                 lambda: means + traces - 2 * np.trace(root(sigma1) @ root(sigma2)),
             "the root is taken of each number, not of the matrix":
                 lambda: means + traces - 2 * np.sqrt(np.abs(np.diag(sigma1 @ sigma2))).sum(),
             "tr(sigma1 + sigma2) is missing": means - 2 * trace_of_root,
             "the root's sign is wrong": means + traces + 2 * trace_of_root}
    same(distance(s, *gaussians), number(value), what, (), atol, 1e-7, wrong)


def rotation(size, seed):
    return np.linalg.qr(normal(size, size, seed=seed).double().numpy())[0]


def distance_of_the_original(s):
    """The distance equals pytorch-fid's for 500 rows in 64 dimensions"""
    arrays = {name: array.numpy() for name, array in golden("metrics_features").items()}
    facts = FACTS["metrics_features"]["frechet"]["a_vs_b (500 rows)"]
    gaussians = [arrays[name] for name in ("mu_a_f64", "sigma_a_f64", "mu_b_f64", "sigma_b_f64")]
    mu1, sigma1, mu2, sigma2 = gaussians
    trace = (np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - facts["eigh_reference"]) / 2
    same_distance(s, gaussians, trace, "500 rows in 64 dimensions", 1e-5)


def laws(s):
    """A Gaussian is 0 from itself, a shift by d gives |d|^2, a common rotation nothing; the distance is symmetric"""
    mu, shift, turn = np.arange(5.0), np.array([1, -2, 0, 0.5, 3]), rotation(5, 2)
    a = np.cov(normal(9, 5, seed=1).double().numpy(), rowvar=False)
    b = np.cov(normal(12, 5, seed=3).double().numpy() * np.array([1, 2, 0.3, 1, 4]), rowvar=False)
    kept = [array.copy() for array in (mu, a, b)]
    same_distance(s, (mu, a, mu, a), np.trace(a), "distance of a Gaussian to itself")
    same_distance(s, (mu, a, mu + shift, a), np.trace(a), "distance after a shift by d, which is |d|^2")
    same_distance(s, (mu, a, mu, 4 * a), 2 * np.trace(a), "distance after scaling by 2, which is the trace")
    one = distance(s, mu, a, mu + shift, b)
    same(distance(s, mu + shift, b, mu, a), one, "the two Gaussians exchanged", (), 1e-4)
    turned = distance(s, turn @ mu, turn @ a @ turn.T, turn @ (mu + shift), turn @ b @ turn.T)
    same(turned, one, "both Gaussians rotated", (), 1e-4)
    true(all(np.array_equal(x, y) for x, y in zip((mu, a, b), kept)), "frechet_distance changes an array it is given")


def no_commuting(s):
    """The distance is right for covariances that do not commute"""
    turn, mu, other = rotation(6, 4), np.zeros(6), np.array([0.5, 0, -1, 2, 0, 1])
    sigma1, sigma2, trace = np.zeros((6, 6)), np.zeros((6, 6)), 0.0
    for i in range(3):  # of 2 x 2 blocks, tr root(AB) = sqrt(tr AB + 2 sqrt(det AB))
        a, b = (x @ x.T + 0.1 * np.eye(2) for x in normal(2, 2, 2, seed=10 + i).double().numpy())
        here = slice(2 * i, 2 * i + 2)
        sigma1[here, here], sigma2[here, here] = a, b
        trace += math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    gaussians = mu, turn @ sigma1 @ turn.T, other, turn @ sigma2 @ turn.T
    same_distance(s, gaussians, trace, "covariances that do not commute")


def singular(s):
    """The distance is right for singular covariances"""
    diagonals = np.diag([4.0, 0, 1, 0, 0.25]), np.diag([9.0, 1, 0, 0, 4])
    zero = np.zeros(5)
    same_distance(s, (zero, diagonals[0], zero + 1, diagonals[1]), 7.0, "diagonal covariances with zeros")
    u, v = (x / np.linalg.norm(x) * 2 for x in normal(2, 5, seed=7).double().numpy())
    same_distance(s, (zero, np.outer(u, u), zero + 1, np.outer(v, v)), abs(u @ v), "covariances of rank 1")
    same_distance(s, (zero, np.zeros((5, 5)), zero + 1, diagonals[1]), 0.0, "a covariance of 0")


def few_images(s):
    """The distance is right with fewer rows than dimensions"""
    for rows, others in ((20, 33), (20, 120)):
        x, y = normal(rows, 60, seed=8).double().numpy(), (normal(others, 60, seed=9) * 1.5 + 0.1).double().numpy()
        a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
        trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()  # the centred rows are factors of the covariances
        gaussians = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
        same_distance(s, gaussians, trace, f"{rows} and {others} rows in 60 dimensions")
        itself = *gaussians[:2], *gaussians[:2]
        same_distance(s, itself, np.trace(gaussians[1]), f"{rows} rows in 60 dimensions, against themselves")


# Precision and recall ------------------------------------------------------------------------------------------------


def points(n, seed, scale):
    """Points with whole coordinates, so that every distance is exact, many tie, and some points coincide."""
    return (normal(n, 2, seed=seed) * scale).round()


def shares(reference, samples, k, mistake=""):
    """Precision and recall by brute force, in whole numbers: squared distances."""
    a, b = (x.long().tolist() for x in (reference, samples))

    def apart(p, q):
        return sum((i - j) ** 2 for i, j in zip(p, q))

    def radii(points, others):
        rows = (sorted(apart(p, q) for j, q in enumerate(others) if j != i or mistake in ("own", "other set"))
                for i, p in enumerate(points))
        return [row[k if mistake == "late" else k - 1] for row in rows]

    def share(points, centres, radii_of_centres, own):
        inside = 0
        for i, p in enumerate(points):
            if mistake == "own balls":
                inside += any(apart(p, q) <= own[i] for q in centres)
            elif mistake == "rim":
                inside += any(apart(p, q) < r for q, r in zip(centres, radii_of_centres))
            elif mistake == "all":
                inside += all(apart(p, q) <= r for q, r in zip(centres, radii_of_centres))
            elif mistake == "nearest":
                nearest = min(range(len(centres)), key=lambda j: apart(p, centres[j]))
                inside += apart(p, centres[nearest]) <= radii_of_centres[nearest]
            else:
                inside += any(apart(p, q) <= r for q, r in zip(centres, radii_of_centres))
        return inside / len(points)

    ra, rb = (radii(x, y) for x, y in (((a, b), (b, a)) if mistake == "other set" else ((a, a), (b, b))))
    return share(b, a, ra, rb), share(a, b, rb, ra)


def same_shares(s, reference, samples, what, k, block=1000):
    before = reference.clone(), samples.clone()
    found = s.fid.precision_recall(reference, samples, k=k, block=block)
    true(len(found) == 2, f"{what}: should give two numbers")
    true(all(torch.equal(x, y) for x, y in zip((reference, samples), before)), f"{what}: changes the features")
    expected = shares(reference, samples, k)
    wrong = {"precision and recall are exchanged": expected[::-1]}
    wrong |= {text: lambda mistake=mistake: shares(reference, samples, k, mistake) for text, mistake in {
        "the rim of a ball does not count": "rim", "a point counts as its own neighbour": "own",
        "the radius goes to the neighbour after the k-th": "late", "the radius comes from the other set": "other set",
        "asks whether a point's own ball holds one of the set, not whether it lies in one of the set's": "own balls",
        "a point has to lie in all balls, not in any": "all",
        "only the nearest point's ball is asked": "nearest"}.items()}
    wrong |= {f"equals the result of k = {other}": lambda other=other: shares(reference, samples, other)
              for other in (1, 3, 5) if other != k}
    n, m = len(reference), len(samples)
    wrong |= {"are counts, not shares": (expected[0] * m, expected[1] * n),
              "is divided by the count of the other set": (expected[0] * m / n, expected[1] * n / m)}
    for i, name in enumerate(("precision", "recall")):
        likely = {text: lambda make=make: number((make() if callable(make) else make)[i])
                  for text, make in wrong.items()}
        same(number(found[i]), number(expected[i]), f"{what}: {name}", (), 1e-6, 0, likely)



def unequal_counts(s):
    """Precision and recall are right for sets of unequal counts, k 1 and 5; the rim counts; 500 rows as in ADM"""
    for n, m, k in ((40, 23, 1), (23, 40, 5), (31, 34, 3)):
        same_shares(s, points(n, 1, 5), points(m, 2, 8), f"{n} real, {m} samples, k {k}", k)
        same_shares(s, points(n, 3, 9), points(m, 4, 3), f"{n} real, {m} samples, k {k}", k)
    facts = FACTS["metrics_features"]["precision_recall_adm (k=3)"]
    facts, arrays = facts["by_distance_arithmetic"]["float64"], golden("metrics_features")
    found = s.fid.precision_recall(arrays["a"], arrays["b"])
    same(number(*found), number(facts["precision"], facts["recall"]), "500 rows of 64 numbers", ("number",), 0.003, 0)


def several_blocks(s):
    """Precision and recall do not depend on `block`, and the sets exchanged exchange the two numbers"""
    for n, m, block in ((41, 27, 10), (17, 38, 16), (25, 31, 1), (30, 20, 10)):
        a, b = points(n, 5, 7), points(m, 6, 5)
        same_shares(s, a, b, f"{n} real, {m} samples, block {block}", 2, block)
        same_shares(s, b, a, f"{m} real, {n} samples, block {block}", 2, block)


class Sizes(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for x in made if isinstance(made, (tuple, list)) else [made]:
            self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size()
                               if isinstance(x, torch.Tensor) else 0)
        return made


def memory(s):
    """Only `block` rows of distances are held at a time"""
    with Sizes() as sizes:
        s.fid.precision_recall(points(300, 7, 9), points(200, 8, 9), block=10)
    true(sizes.largest < 200 * 200, f"300 and 200 rows, block 10: a tensor of {sizes.largest} numbers is made; a block "
         "has 10 x 300 distances at most")


# The Inception Score -------------------------------------------------------------------------------------------------


def divergence(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q) if x > 0)


def score(probs, size, mistake=""):
    """By loops."""
    rows = [[float(x) for x in row] for row in probs]
    splits, scores, weights = [rows[i:i + size] for i in range(0, len(rows), size)], [], []
    if mistake == "one":
        splits = [rows]
    if mistake == "drop":
        splits = [split for split in splits if len(split) == size] or splits
    if mistake == "interleaved":
        splits = [rows[i::len(splits)] for i in range(len(splits))]
    for split in splits:
        over = rows if mistake == "global" else split
        mean = [sum(column) / len(over) for column in zip(*over)]
        terms = [divergence(mean, p) if mistake == "reverse" and min(p) > 0 else divergence(p, mean) for p in split]
        scores.append(sum(terms) / len(terms))
        weights.append(len(split))
    if mistake == "log":
        return sum(scores) / len(scores)
    if mistake == "exp of mean":
        return math.exp(sum(scores) / len(scores))
    if mistake == "bits":
        return sum(math.exp(x / math.log(2)) for x in scores) / len(scores)
    if mistake == "weighted":
        return sum(w * math.exp(x) for w, x in zip(weights, scores)) / sum(weights)
    return sum(math.exp(x) for x in scores) / len(scores)


def same_score(found, probs, size, what):
    wrong = {"equals the score of all rows as one split": "one", "the short last split is left out": "drop",
             "splits count by their length: the plain average is asked": "weighted",
             "the exponential is missing": "log",
             "equals exp of the splits' mean, not the mean of the exp": "exp of mean",
             "compares with the mean of all rows, not of the split's": "global",
             "takes KL(mean || p), not KL(p || mean)": "reverse",
             "counts in bits, but takes exp": "bits", "equals the score of interleaved splits": "interleaved"}
    if size >= len(probs):  # one split: these are no mistakes
        wrong = {text: mistake for text, mistake in wrong.items() if mistake in ("log", "reverse", "bits")}
    same(number(found), number(score(probs, size)), what, (), 1e-6, 1e-5,
         {text: lambda mistake=mistake: number(score(probs, size, mistake)) for text, mistake in wrong.items()})


def probabilities(rows, classes, seed):
    """Rows of unlike sharpness, sorted so that splits differ."""
    logits = normal(rows, classes, seed=seed).double() * torch.linspace(0.3, 4, rows)[:, None]
    return logits.softmax(1)


def one_split(s):
    """The score of one split: exp of the mean divergence from the mean; torch and numpy, float32 and float64"""
    p = probabilities(13, 6, 1)
    for what, given in (("a torch array", p), ("a numpy array", p.numpy()), ("a float32 torch array", p.float()),
                        ("a float32 numpy array", p.float().numpy())):
        before = given.clone() if isinstance(given, torch.Tensor) else given.copy()
        same_score(s.fid.inception_score(given), p, 5000, f"inception_score of {what}")
        same_score(s.fid.inception_score(given, 13), p, 13, f"inception_score of {what}, one full split")
        true((given == before).all(), f"inception_score of {what}: changes the array it is given")


def splits(s):
    """The score is the plain average over splits of consecutive rows; the last may be short"""
    for rows, size in ((20, 5), (23, 10), (23, 7), (6, 4), (5, 1), (11, 10)):
        p = probabilities(rows, 4, 2)
        same_score(s.fid.inception_score(p, size), p, size, f"inception_score of {rows} rows, split_size {size}")


def zeros(s):
    """A probability of 0 adds nothing, also of a class that no row of a split has"""
    p = torch.zeros(8, 5, dtype=torch.float64)
    p[0, 0] = p[1, 1] = p[6, 3] = 1
    p[2:6, 1:3] = torch.tensor([[0.25, 0.75], [1, 0], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    p[7, [0, 4]] = 0.5
    for given in (p, p.numpy(), p.float()):
        for size in (8, 3):
            found = s.fid.inception_score(given, size)
            same_score(found, p, size, f"inception_score of probabilities with zeros, split_size {size}")
    same(number(s.fid.inception_score(np.eye(4))), number(4), "inception_score of four unlike rows")


CHECKS = [(1, few_rows), (2, many_rows), (2, laws), (2, no_commuting), (2, singular), (2, few_images),
          (1, distance_of_the_original), (2, unequal_counts), (2, several_blocks), (1, memory), (1, one_split),
          (1, splits), (1, zeros)]
