# file: fid.py
# function: statistics
# exercise: metrics
# kind: right
# why: all at once in float64
def statistics(x):
    x = x.double()
    mu = x.mean(dim=0)
    centred = x - mu
    sigma = centred.T @ centred / (len(x) - 1)
    return mu.numpy(), sigma.numpy()


# file: fid.py
# function: statistics
# exercise: metrics
# kind: right
# why: one row after the other (Welford)
def statistics(x):
    mean = torch.zeros(x.shape[1], dtype=torch.float64)
    squares = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for n, row in enumerate(x.double(), start=1):
        before = row - mean
        mean = mean + before / n
        squares += torch.outer(before, row - mean)
    return mean.numpy(), ((squares + squares.T) / 2 / (len(x) - 1)).numpy()


# file: fid.py
# function: statistics
# exercise: metrics
# kind: right
# why: moments about the first row, in blocks of 256
def statistics(x):
    origin, total, products = x[0].double(), 0, 0
    for rows in x.split(256):
        rows = rows.double() - origin
        total, products = total + rows.sum(0), products + torch.einsum("ni,nj->ij", rows, rows)
    shift = total / len(x)
    sigma = (products - len(x) * torch.outer(shift, shift)) / (len(x) - 1)
    return (origin + shift).numpy(), sigma.numpy()


# file: fid.py
# function: statistics
# exercise: metrics
# kind: mutant
# why: divides by N
def statistics(x):
    x = x.double()
    mu = x.mean(dim=0)
    centred = x - mu
    sigma = centred.T @ centred / len(x)
    return mu.numpy(), sigma.numpy()


# file: fid.py
# function: statistics
# exercise: metrics
# kind: mutant
# why: between rows instead of between features
def statistics(x):
    x = x.double()
    mu = x.mean(dim=0)
    centred = x - mu
    sigma = centred @ centred.T / (len(x) - 1)
    return mu.numpy(), sigma.numpy()


# file: fid.py
# function: statistics
# exercise: metrics
# kind: mutant
# why: the blocks are centred by their own means
def statistics(x):
    x = x.double()
    mu = x.mean(dim=0)
    centred = [rows - rows.mean(dim=0) for rows in x.split(1000)]
    sigma = sum(rows.T @ rows for rows in centred) / (len(x) - 1)
    return mu.numpy(), sigma.numpy()


# file: fid.py
# function: statistics
# exercise: metrics
# kind: mutant
# why: returns float32
def statistics(x):
    x = x.double()
    mu = x.mean(dim=0)
    centred = x - mu
    sigma = centred.T @ centred / (len(x) - 1)
    return mu.float().numpy(), sigma.float().numpy()


# file: fid.py
# function: statistics
# exercise: metrics
# kind: mutant
# why: variances only
def statistics(x):
    x = x.double()
    mu = x.mean(dim=0)
    centred = x - mu
    sigma = (centred.square().sum(0) / (len(x) - 1)).diag()
    return mu.numpy(), sigma.numpy()


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: right
# why: factors by eigenvectors, singular values of their product
def frechet_distance(mu1, sigma1, mu2, sigma2):
    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(np.maximum(values, 0))

    singular = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False)
    root = singular.sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: right
# why: torch: nuclear norm of the product of the two symmetric roots
def frechet_distance(mu1, sigma1, mu2, sigma2):
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(array) for array in (mu1, sigma1, mu2, sigma2))
    roots = []
    for sigma in (sigma1, sigma2):
        u, s, _ = torch.linalg.svd(sigma)
        roots.append(u @ s.sqrt().diag() @ u.T)
    cross = torch.linalg.matrix_norm(roots[0] @ roots[1], ord="nuc")
    return (torch.dist(mu1, mu2) ** 2 + torch.trace(sigma1) + torch.trace(sigma2) - 2 * cross).item()


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: right
# why: pivoted Cholesky with LAPACK, nuclear norm
def frechet_distance(mu1, sigma1, mu2, sigma2):
    factors = []
    for sigma in (sigma1, sigma2):
        upper, pivots, rank, _ = dpstrf(sigma, lower=0)
        rows = np.empty((rank, len(sigma)))
        rows[:, pivots - 1] = np.triu(upper)[:rank]
        factors.append(rows)
    overlap = np.linalg.norm(factors[0] @ factors[1].T, ord="nuc") if min(map(len, factors)) else 0.0
    return float(np.linalg.norm(mu1 - mu2) ** 2 + np.einsum("ii", sigma1) + np.einsum("ii", sigma2) - 2 * overlap)


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: mutant
# why: the distance of the means is not squared
def frechet_distance(mu1, sigma1, mu2, sigma2):
    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(np.maximum(values, 0))

    singular = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False)
    root = singular.sum()
    return float(np.sqrt(((mu1 - mu2) ** 2).sum()) + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: mutant
# why: the factor 2 is forgotten
def frechet_distance(mu1, sigma1, mu2, sigma2):
    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(np.maximum(values, 0))

    singular = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False)
    root = singular.sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - root)


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: mutant
# why: the Frobenius norm in place of the sum of singular values
def frechet_distance(mu1, sigma1, mu2, sigma2):
    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(np.maximum(values, 0))

    singular = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False)
    root = np.sqrt((singular ** 2).sum())
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: mutant
# why: roots of eigenvalues that rounding made negative: not a number
def frechet_distance(mu1, sigma1, mu2, sigma2):
    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values)

    singular = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False)
    root = singular.sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


# file: fid.py
# function: frechet_distance
# exercise: metrics
# kind: mutant
# why: adds 0.001 to both diagonals to avoid singular ones
def frechet_distance(mu1, sigma1, mu2, sigma2):
    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma + 1e-3 * np.eye(len(sigma)))
        return vectors * np.sqrt(np.maximum(values, 0))

    singular = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False)
    root = singular.sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: right
# why: kthvalue, blocks of samples
def precision_recall(reference, samples, k=3, block=1000):
    def radii(points):
        parts = [torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)]
        return torch.cat(parts)

    real_radii, fake_radii = radii(reference), radii(samples)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, own in zip(samples.split(block), fake_radii.split(block)):
        distances = torch.cdist(rows, reference)
        inside += int((distances <= real_radii).any(dim=1).sum())
        covered |= (distances <= own[:, None]).any(dim=0)
    return inside / len(samples), int(covered.sum()) / len(reference)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: right
# why: squared distances in float64 by numpy, point by point
def precision_recall(reference, samples, k=3, block=1000):
    sets = [x.cpu().numpy().astype(np.float64) for x in (reference, samples)]

    def squared(points, row):
        return ((points - row) ** 2).sum(1)

    radii = [np.array([np.partition(squared(points, row), k)[k] for row in points]) for points in sets]
    shares = []
    for balls, others in ((0, 1), (1, 0)):
        held = sum(bool((squared(sets[balls], row) <= radii[balls]).any()) for row in sets[others])
        shares.append(held / len(sets[others]))
    return tuple(shares)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: right
# why: a point's own distance is made infinite, then the k smallest
def precision_recall(reference, samples, k=3, block=1000):
    def distance(rows, points):
        return torch.stack([torch.linalg.vector_norm(points - row, dim=1) for row in rows])

    def radii(points):
        values = []
        for start in range(0, len(points), block):
            rows = points[start:start + block]
            own = distance(rows, points)
            index = torch.arange(len(rows), device=points.device)
            own[index, start + index] = math.inf
            values.append(own.topk(k, largest=False).values.amax(dim=1))
        return torch.cat(values)

    real, fake = radii(reference), radii(samples)
    precise = sum((distance(rows, reference) <= real).any(1).sum().item() for rows in samples.split(block))
    recalled = sum((distance(rows, samples) <= fake).any(1).sum().item() for rows in reference.split(block))
    return precise / len(samples), recalled / len(reference)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: mutant
# why: a point counts as its own nearest: the k-th with itself
def precision_recall(reference, samples, k=3, block=1000):
    def radii(points):
        parts = [torch.cdist(rows, points).kthvalue(k, dim=1).values for rows in points.split(block)]
        return torch.cat(parts)

    real_radii, fake_radii = radii(reference), radii(samples)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, own in zip(samples.split(block), fake_radii.split(block)):
        distances = torch.cdist(rows, reference)
        inside += int((distances <= real_radii).any(dim=1).sum())
        covered |= (distances <= own[:, None]).any(dim=0)
    return inside / len(samples), int(covered.sum()) / len(reference)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: mutant
# why: the rim does not count
def precision_recall(reference, samples, k=3, block=1000):
    def radii(points):
        parts = [torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)]
        return torch.cat(parts)

    real_radii, fake_radii = radii(reference), radii(samples)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, own in zip(samples.split(block), fake_radii.split(block)):
        distances = torch.cdist(rows, reference)
        inside += int((distances < real_radii).any(dim=1).sum())
        covered |= (distances < own[:, None]).any(dim=0)
    return inside / len(samples), int(covered.sum()) / len(reference)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: mutant
# why: a reference point covered from two blocks counts twice
def precision_recall(reference, samples, k=3, block=1000):
    def radii(points):
        parts = [torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)]
        return torch.cat(parts)

    real_radii, fake_radii = radii(reference), radii(samples)
    inside = 0
    covered = torch.zeros(1, dtype=torch.long, device=reference.device)
    for rows, own in zip(samples.split(block), fake_radii.split(block)):
        distances = torch.cdist(rows, reference)
        inside += int((distances <= real_radii).any(dim=1).sum())
        covered += (distances <= own[:, None]).any(dim=0).sum()
    return inside / len(samples), int(covered.sum()) / len(reference)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: mutant
# why: the ball of the point itself decides instead of the set's balls: precision by the samples' radii
def precision_recall(reference, samples, k=3, block=1000):
    def radii(points):
        parts = [torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)]
        return torch.cat(parts)

    real_radii, fake_radii = radii(reference), radii(samples)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, own in zip(samples.split(block), fake_radii.split(block)):
        distances = torch.cdist(rows, reference)
        inside += int((distances <= own[:, None]).any(dim=1).sum())
        covered |= (distances <= own[:, None]).any(dim=0)
    return inside / len(samples), int(covered.sum()) / len(reference)


# file: fid.py
# function: precision_recall
# exercise: metrics
# kind: mutant
# why: only the nearest point's ball is asked
def precision_recall(reference, samples, k=3, block=1000):
    def radii(points):
        parts = [torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)]
        return torch.cat(parts)

    real_radii, fake_radii = radii(reference), radii(samples)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, own in zip(samples.split(block), fake_radii.split(block)):
        distances = torch.cdist(rows, reference)
        inside += int((distances.amin(1) <= real_radii[distances.argmin(1)]).sum())
        covered |= (distances <= own[:, None]).any(dim=0)
    return inside / len(samples), int(covered.sum()) / len(reference)


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: right
# why: a loop over the splits
def inception_score(probs, split_size=5000):
    probs = np.asarray(probs, dtype=np.float64)
    scores = []
    for start in range(0, len(probs), split_size):
        part = probs[start:start + split_size]
        mean = part.mean(axis=0)
        divergence = rel_entr(part, mean).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: right
# why: plain Python
def inception_score(probs, split_size=5000):
    rows = [[float(p) for p in row] for row in probs]
    total, splits = 0.0, 0
    while rows:
        part, rows = rows[:split_size], rows[split_size:]
        means = [sum(column) / len(part) for column in zip(*part)]
        kl = sum(p * math.log(p / m) for row in part for p, m in zip(row, means) if p > 0) / len(part)
        total, splits = total + math.exp(kl), splits + 1
    return total / splits


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: right
# why: logs only where there is something
def inception_score(probs, split_size=5000):
    probs = np.asarray(probs).astype(np.float64)
    cuts = np.arange(split_size, len(probs), split_size)
    scores = []
    for part in np.split(probs, cuts):
        ratio = np.divide(part, part.mean(0, keepdims=True), out=np.ones_like(part), where=part > 0)
        scores.append(math.exp((part * np.log(ratio)).sum() / len(part)))
    return sum(scores) / len(scores)


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: mutant
# why: the last split is left out if it is short
def inception_score(probs, split_size=5000):
    probs = np.asarray(probs, dtype=np.float64)
    scores = []
    for start in range(0, max(1, len(probs) - split_size + 1), split_size):
        part = probs[start:start + split_size]
        mean = part.mean(axis=0)
        divergence = rel_entr(part, mean).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: mutant
# why: exp per image, before the mean
def inception_score(probs, split_size=5000):
    probs = np.asarray(probs, dtype=np.float64)
    scores = []
    for start in range(0, len(probs), split_size):
        part = probs[start:start + split_size]
        mean = part.mean(axis=0)
        divergence = rel_entr(part, mean).sum(axis=1)
        scores.append(np.exp(divergence).mean())
    return float(np.mean(scores))


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: mutant
# why: 0 log 0 is not a number
def inception_score(probs, split_size=5000):
    probs = np.asarray(probs, dtype=np.float64)
    scores = []
    for start in range(0, len(probs), split_size):
        part = probs[start:start + split_size]
        mean = part.mean(axis=0)
        divergence = (part * np.log(part / mean)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: mutant
# why: mean over classes instead of sum
def inception_score(probs, split_size=5000):
    probs = np.asarray(probs, dtype=np.float64)
    scores = []
    for start in range(0, len(probs), split_size):
        part = probs[start:start + split_size]
        mean = part.mean(axis=0)
        divergence = rel_entr(part, mean).mean(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


# file: fid.py
# function: inception_score
# exercise: metrics
# kind: mutant
# why: always splits of 5000
def inception_score(probs, split_size=5000):
    split_size = 5000
    probs = np.asarray(probs, dtype=np.float64)
    scores = []
    for start in range(0, len(probs), split_size):
        part = probs[start:start + split_size]
        mean = part.mean(axis=0)
        divergence = rel_entr(part, mean).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))
