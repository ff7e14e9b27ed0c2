# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: right
# why: the formulas in order
def diffusion_schedule(steps=1000):
    if steps < 2 or steps > 1000:
        raise ValueError(f"steps must lie in 2..1000, not {steps}")
    f = np.cos(math.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = np.cumprod(1 - betas)[timesteps]
    before = np.concatenate([[1.0], a[:-1]])
    beta = 1 - a / before
    variance = beta * (1 - before) / (1 - a)
    variance[0] = variance[1]
    return {
        "timesteps": timesteps,
        "signal": np.sqrt(a),
        "noise": np.sqrt(1 - a),
        "recip_signal": np.sqrt(1 / a),
        "recip_noise": np.sqrt(1 / a - 1),
        "log_beta": np.log(beta),
        "log_posterior": np.log(variance),
        "x0_weight": beta * np.sqrt(before) / (1 - a),
        "xt_weight": np.sqrt(1 - beta) * (1 - before) / (1 - a),
    }


# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: right
# why: plain Python loops, arrays only at the end
def diffusion_schedule(steps=1000):
    if steps not in range(2, 1001):
        raise ValueError(f"{steps} steps: must be from 2 to 1000")

    def f(s):
        return math.cos(math.pi / 2 * (s / 1000 + 0.008) / 1.008) ** 2

    left, product = [], 1.0
    for s in range(1000):
        product *= 1 - min(0.999, 1 - f(s + 1) / f(s))
        left.append(product)
    names = ["timesteps", "signal", "noise", "recip_signal", "recip_noise", "x0_weight", "xt_weight", "log_posterior",
             "log_beta"]
    rows, before = [], 1.0
    for i in range(steps):
        t = round(i * 999 / (steps - 1))
        a = left[t]
        beta = 1 - a / before
        variance = beta * (1 - before) / (1 - a)
        rows.append([t, a ** 0.5, (1 - a) ** 0.5, a ** -0.5, ((1 - a) / a) ** 0.5,
                     beta * before ** 0.5 / (1 - a), (1 - beta) ** 0.5 * (1 - before) / (1 - a),
                     math.log(variance) if i else None, math.log(beta)])
        before = a
    rows[0][7] = rows[1][7]
    return {name: np.array(column) for name, column in zip(names, zip(*rows))}


# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: right
# why: torch in float64, sums of logarithms instead of products
def diffusion_schedule(steps=1000):
    if not 2 <= steps <= 1000:
        raise ValueError("between 2 and 1000 steps, please")
    s = torch.arange(1001, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (s / 1000 + 0.008) / 1.008).square()
    log_a_all = torch.log1p(-(1 - f[1:] / f[:-1]).clamp(max=0.999)).cumsum(0)
    timesteps = torch.tensor([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = log_a_all[timesteps].exp()
    previous = torch.nn.functional.pad(a[:-1], (1, 0), value=1.0)
    alpha = a / previous
    beta = 1 - alpha
    posterior = beta * (1 - previous) / (1 - a)
    log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()
    tables = dict(timesteps=timesteps, signal=a.sqrt(), noise=(1 - a).sqrt(), recip_signal=a.rsqrt(),
                  recip_noise=(1 / a - 1).sqrt(), log_beta=beta.log(), log_posterior=log_posterior,
                  x0_weight=beta * previous.sqrt() / (1 - a), xt_weight=alpha.sqrt() * (1 - previous) / (1 - a))
    return {key: value.numpy() for key, value in tables.items()}


# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: mutant
# why: beta is not kept below 0.999
def diffusion_schedule(steps=1000):
    if steps < 2 or steps > 1000:
        raise ValueError(f"steps must lie in 2..1000, not {steps}")
    f = np.cos(math.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    betas = 1 - f[1:] / f[:-1]
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = np.cumprod(1 - betas)[timesteps]
    before = np.concatenate([[1.0], a[:-1]])
    beta = 1 - a / before
    variance = beta * (1 - before) / (1 - a)
    variance[0] = variance[1]
    return {
        "timesteps": timesteps,
        "signal": np.sqrt(a),
        "noise": np.sqrt(1 - a),
        "recip_signal": np.sqrt(1 / a),
        "recip_noise": np.sqrt(1 / a - 1),
        "log_beta": np.log(beta),
        "log_posterior": np.log(variance),
        "x0_weight": beta * np.sqrt(before) / (1 - a),
        "xt_weight": np.sqrt(1 - beta) * (1 - before) / (1 - a),
    }


# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: mutant
# why: beta of the long chain at the kept levels (right for 1000 steps only)
def diffusion_schedule(steps=1000):
    if steps < 2 or steps > 1000:
        raise ValueError(f"steps must lie in 2..1000, not {steps}")
    f = np.cos(math.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = np.cumprod(1 - betas)[timesteps]
    before = np.concatenate([[1.0], a[:-1]])
    beta = betas[timesteps]
    variance = beta * (1 - before) / (1 - a)
    variance[0] = variance[1]
    return {
        "timesteps": timesteps,
        "signal": np.sqrt(a),
        "noise": np.sqrt(1 - a),
        "recip_signal": np.sqrt(1 / a),
        "recip_noise": np.sqrt(1 / a - 1),
        "log_beta": np.log(beta),
        "log_posterior": np.log(variance),
        "x0_weight": beta * np.sqrt(before) / (1 - a),
        "xt_weight": np.sqrt(1 - beta) * (1 - before) / (1 - a),
    }


# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: mutant
# why: log_posterior at 0 is the log of a tiny number instead of index 1's
def diffusion_schedule(steps=1000):
    if steps < 2 or steps > 1000:
        raise ValueError(f"steps must lie in 2..1000, not {steps}")
    f = np.cos(math.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = np.cumprod(1 - betas)[timesteps]
    before = np.concatenate([[1.0], a[:-1]])
    beta = 1 - a / before
    variance = beta * (1 - before) / (1 - a)
    variance[0] = 1e-20
    return {
        "timesteps": timesteps,
        "signal": np.sqrt(a),
        "noise": np.sqrt(1 - a),
        "recip_signal": np.sqrt(1 / a),
        "recip_noise": np.sqrt(1 / a - 1),
        "log_beta": np.log(beta),
        "log_posterior": np.log(variance),
        "x0_weight": beta * np.sqrt(before) / (1 - a),
        "xt_weight": np.sqrt(1 - beta) * (1 - before) / (1 - a),
    }


# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: mutant
# why: xt_weight with sqrt(a_i) where sqrt(1 - beta_i) belongs
def diffusion_schedule(steps=1000):
    if steps < 2 or steps > 1000:
        raise ValueError(f"steps must lie in 2..1000, not {steps}")
    f = np.cos(math.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = np.cumprod(1 - betas)[timesteps]
    before = np.concatenate([[1.0], a[:-1]])
    beta = 1 - a / before
    variance = beta * (1 - before) / (1 - a)
    variance[0] = variance[1]
    return {
        "timesteps": timesteps,
        "signal": np.sqrt(a),
        "noise": np.sqrt(1 - a),
        "recip_signal": np.sqrt(1 / a),
        "recip_noise": np.sqrt(1 / a - 1),
        "log_beta": np.log(beta),
        "log_posterior": np.log(variance),
        "x0_weight": beta * np.sqrt(before) / (1 - a),
        "xt_weight": np.sqrt(a) * (1 - before) / (1 - a),
    }


# file: d2c.py
# function: diffusion_schedule
# exercise: diffusion
# kind: mutant
# why: the first entry of log_posterior repeats log_beta's first
def diffusion_schedule(steps=1000):
    if steps < 2 or steps > 1000:
        raise ValueError(f"steps must lie in 2..1000, not {steps}")
    f = np.cos(math.pi / 2 * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = np.cumprod(1 - betas)[timesteps]
    before = np.concatenate([[1.0], a[:-1]])
    beta = 1 - a / before
    variance = beta * (1 - before) / (1 - a)
    variance[0] = beta[0]
    return {
        "timesteps": timesteps,
        "signal": np.sqrt(a),
        "noise": np.sqrt(1 - a),
        "recip_signal": np.sqrt(1 / a),
        "recip_noise": np.sqrt(1 / a - 1),
        "log_beta": np.log(beta),
        "log_posterior": np.log(variance),
        "x0_weight": beta * np.sqrt(before) / (1 - a),
        "xt_weight": np.sqrt(1 - beta) * (1 - before) / (1 - a),
    }


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: right
# why: torch.lerp, minimum and maximum
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    row = {name: table[index] for name, table in tables.items()}
    estimate = (x - row["noise"] * eps) / row["signal"]
    estimate = torch.minimum(torch.maximum(estimate, torch.full_like(estimate, -clip)), torch.full_like(estimate, clip))
    low, high = (row[name].expand_as(fraction) for name in ("log_posterior", "log_beta"))
    return row["x0_weight"] * estimate + row["xt_weight"] * x, torch.lerp(low, high, 0.5 * fraction + 0.5)


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: right
# why: mid and half range of the log-variance; clips only where asked
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    x0 = tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps
    if clip < math.inf:
        x0 = torch.clamp(x0, min=-clip, max=clip)
    high, low = tables["log_beta"][index], tables["log_posterior"][index]
    log_variance = (high + low) / 2 + fraction * (high - low) / 2
    return torch.addcmul(tables["xt_weight"][index] * x, tables["x0_weight"][index], x0), log_variance


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: right
# why: all tables brought to one row per latent first, the formula in float64
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    def at(name):
        return tables[name].index_select(0, index.reshape(-1)).reshape(-1, 1).double()

    kind, x, eps = x.dtype, x.double(), eps.double()
    x0 = (at("recip_signal") * x - at("recip_noise") * eps).clip(-clip, clip)
    mean = at("x0_weight") * x0 + at("xt_weight") * x
    low = at("log_posterior")
    log_variance = low + (at("log_beta") - low) * (fraction.double() + 1) / 2
    return mean.to(kind), log_variance.to(kind)


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: mutant
# why: the clip is forgotten
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    x0 = tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps
    share = (fraction + 1) / 2
    log_variance = share * tables["log_beta"][index] + (1 - share) * tables["log_posterior"][index]
    mean = tables["x0_weight"][index] * x0 + tables["xt_weight"][index] * x
    return mean, log_variance


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: mutant
# why: the clip acts on the mean instead of on x0
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    x0 = tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps
    share = (fraction + 1) / 2
    log_variance = share * tables["log_beta"][index] + (1 - share) * tables["log_posterior"][index]
    mean = tables["x0_weight"][index] * x0 + tables["xt_weight"][index] * x
    return mean.clamp(-clip, clip), log_variance


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: mutant
# why: fraction is clamped to [-1, 1]
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    x0 = tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps
    x0 = x0.clamp(-clip, clip)
    share = (fraction.clamp(-1, 1) + 1) / 2
    log_variance = share * tables["log_beta"][index] + (1 - share) * tables["log_posterior"][index]
    mean = tables["x0_weight"][index] * x0 + tables["xt_weight"][index] * x
    return mean, log_variance


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: mutant
# why: the variances are mixed instead of their logs
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    x0 = tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps
    x0 = x0.clamp(-clip, clip)
    share = (fraction + 1) / 2
    low, high = tables["log_posterior"][index].exp(), tables["log_beta"][index].exp()
    log_variance = (share * high + (1 - share) * low).log()
    mean = tables["x0_weight"][index] * x0 + tables["xt_weight"][index] * x
    return mean, log_variance


# file: d2c.py
# function: posterior_step
# exercise: diffusion
# kind: mutant
# why: all rows take the tables at the first row's index
def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    index = index.flatten()[:1]
    x0 = tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps
    x0 = x0.clamp(-clip, clip)
    share = (fraction + 1) / 2
    log_variance = share * tables["log_beta"][index] + (1 - share) * tables["log_posterior"][index]
    mean = tables["x0_weight"][index] * x0 + tables["xt_weight"][index] * x
    return mean, log_variance


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: right
# why: torch.distributions for the divergence
def diffusion_loss(denoiser, x0, t, noise, c):
    tables, index = schedule_tables(1000, x0.device, x0.dtype), t.unsqueeze(1)
    x = tables["signal"][index] * x0 + tables["noise"][index] * noise
    output = denoiser(x, t, c).to(x0.dtype)
    channels = x0.shape[1]
    eps, fraction = output[:, :channels], output[:, channels:]
    mean_q, log_q = posterior_step(x, noise, -torch.ones_like(noise), tables, index)
    mean_p, log_p = posterior_step(x, eps.detach(), fraction, tables, index)
    q = torch.distributions.Normal(mean_q, (log_q / 2).exp())
    p = torch.distributions.Normal(mean_p, (log_p / 2).exp())
    nats = torch.distributions.kl_divergence(q, p)
    first = (t == 0)[:, None].to(x0.dtype)
    nats = first * discretised_nll(x0, mean_p, log_p / 2) + (1 - first) * nats
    return F.mse_loss(eps, noise, reduction="none").mean(1) + nats.mean(1) / math.log(2)


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: right
# why: rows of t = 0 and of t > 0 taken apart, each kind computed alone
def diffusion_loss(denoiser, x0, t, noise, c):
    tables = schedule_tables(1000, x0.device, x0.dtype)
    x = tables["signal"][t][:, None] * x0 + tables["noise"][t][:, None] * noise
    predicted = denoiser(x, t, c).to(x0.dtype)
    eps, fraction = predicted.tensor_split(2, dim=1)
    loss = (eps - noise).square().mean(1)
    for rows in ((t == 0).nonzero().flatten(), (t > 0).nonzero().flatten()):
        if not len(rows):
            continue
        index = t[rows][:, None]
        mean_p, log_p = posterior_step(x[rows], eps[rows].detach(), fraction[rows], tables, index)
        if index[0, 0] == 0:
            bits = discretised_nll(x0[rows], mean_p, 0.5 * log_p) / math.log(2)
        else:
            mean_q, log_q = posterior_step(x[rows], noise[rows], torch.full_like(x[rows], -1.0), tables, index)
            ratio = (log_q - log_p).exp()
            bits = ((mean_q - mean_p).square() / log_p.exp() + ratio - 1 - (log_q - log_p)) / (2 * math.log(2))
        loss = loss.index_add(0, rows, bits.mean(1))
    return loss


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: right
# why: row by row in a loop, the network called once
def diffusion_loss(denoiser, x0, t, noise, c):
    tables = schedule_tables(1000, x0.device, x0.dtype)
    x = torch.stack([tables["signal"][n] * a + tables["noise"][n] * b for a, b, n in zip(x0, noise, t)])
    eps, fraction = denoiser(x, t, c).to(x0.dtype).split(x0.shape[1], dim=1)
    fixed, losses = eps.clone().detach(), []
    for i in range(len(t)):
        row, index = slice(i, i + 1), t[i:i + 1]
        mean, log_variance = posterior_step(x[row], fixed[row], fraction[row], tables, index)
        if int(t[i]) == 0:
            bound = discretised_nll(x0[row], mean, log_variance * 0.5)
        else:
            mean_q, log_q = posterior_step(x[row], noise[row], 0 * noise[row] - 1, tables, index)
            bound = -0.5 + 0.5 * (log_variance - log_q)
            bound = bound + 0.5 * (log_q.exp() + (mean - mean_q) ** 2) / log_variance.exp()
        losses.append(((eps[i] - noise[i]) ** 2).mean() + bound.mean() / math.log(2))
    return torch.stack(losses)


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: mutant
# why: eps trains through the bound as well: no detach
def diffusion_loss(denoiser, x0, t, noise, c):
    tables = schedule_tables(1000, x0.device, x0.dtype)
    index = t[:, None]
    x = tables["signal"][index] * x0 + tables["noise"][index] * noise
    eps, fraction = denoiser(x, t, c).to(x0.dtype).chunk(2, dim=-1)
    mean_q, log_q = posterior_step(x, noise, torch.full_like(noise, -1), tables, index)
    mean_p, log_p = posterior_step(x, eps, fraction, tables, index)
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + (mean_q - mean_p) ** 2 * (-log_p).exp())
    nll = discretised_nll(x0, mean_p, 0.5 * log_p)
    bound = torch.where(index == 0, nll, kl).mean(-1) / math.log(2)
    return ((eps - noise) ** 2).mean(-1) + bound


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: mutant
# why: KL(p || q) in place of KL(q || p)
def diffusion_loss(denoiser, x0, t, noise, c):
    tables = schedule_tables(1000, x0.device, x0.dtype)
    index = t[:, None]
    x = tables["signal"][index] * x0 + tables["noise"][index] * noise
    eps, fraction = denoiser(x, t, c).to(x0.dtype).chunk(2, dim=-1)
    mean_q, log_q = posterior_step(x, noise, torch.full_like(noise, -1), tables, index)
    mean_p, log_p = posterior_step(x, eps.detach(), fraction, tables, index)
    kl = 0.5 * (log_q - log_p - 1 + (log_p - log_q).exp() + (mean_q - mean_p) ** 2 * (-log_q).exp())
    nll = discretised_nll(x0, mean_p, 0.5 * log_p)
    bound = torch.where(index == 0, nll, kl).mean(-1) / math.log(2)
    return ((eps - noise) ** 2).mean(-1) + bound


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: mutant
# why: the likelihood for the whole batch as soon as one row has t = 0
def diffusion_loss(denoiser, x0, t, noise, c):
    tables = schedule_tables(1000, x0.device, x0.dtype)
    index = t[:, None]
    x = tables["signal"][index] * x0 + tables["noise"][index] * noise
    eps, fraction = denoiser(x, t, c).to(x0.dtype).chunk(2, dim=-1)
    mean_q, log_q = posterior_step(x, noise, torch.full_like(noise, -1), tables, index)
    mean_p, log_p = posterior_step(x, eps.detach(), fraction, tables, index)
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + (mean_q - mean_p) ** 2 * (-log_p).exp())
    nll = discretised_nll(x0, mean_p, 0.5 * log_p)
    bound = (nll if (t == 0).any() else kl).mean(-1) / math.log(2)
    return ((eps - noise) ** 2).mean(-1) + bound


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: mutant
# why: one mean over the batch instead of a loss per row
def diffusion_loss(denoiser, x0, t, noise, c):
    tables = schedule_tables(1000, x0.device, x0.dtype)
    index = t[:, None]
    x = tables["signal"][index] * x0 + tables["noise"][index] * noise
    eps, fraction = denoiser(x, t, c).to(x0.dtype).chunk(2, dim=-1)
    mean_q, log_q = posterior_step(x, noise, torch.full_like(noise, -1), tables, index)
    mean_p, log_p = posterior_step(x, eps.detach(), fraction, tables, index)
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + (mean_q - mean_p) ** 2 * (-log_p).exp())
    nll = discretised_nll(x0, mean_p, 0.5 * log_p)
    bound = torch.where(index == 0, nll, kl).mean(-1) / math.log(2)
    return (((eps - noise) ** 2).mean(-1) + bound).mean()


# file: d2c.py
# function: diffusion_loss
# exercise: diffusion
# kind: mutant
# why: the difference of the means is measured by q's variance
def diffusion_loss(denoiser, x0, t, noise, c):
    tables = schedule_tables(1000, x0.device, x0.dtype)
    index = t[:, None]
    x = tables["signal"][index] * x0 + tables["noise"][index] * noise
    eps, fraction = denoiser(x, t, c).to(x0.dtype).chunk(2, dim=-1)
    mean_q, log_q = posterior_step(x, noise, torch.full_like(noise, -1), tables, index)
    mean_p, log_p = posterior_step(x, eps.detach(), fraction, tables, index)
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + (mean_q - mean_p) ** 2 * (-log_q).exp())
    nll = discretised_nll(x0, mean_p, 0.5 * log_p)
    bound = torch.where(index == 0, nll, kl).mean(-1) / math.log(2)
    return ((eps - noise) ** 2).mean(-1) + bound
