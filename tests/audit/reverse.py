# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: right
# why: two kinds of call told apart by the number of rows
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    rows, t = len(x), tables["timesteps"][index]
    if len(c) == rows:
        eps, fraction = denoiser(x, t, c).chunk(2, dim=-1)
    else:
        both, fraction = denoiser(torch.cat([x, x]), t, c).chunk(2, dim=-1)
        fraction = fraction[:rows]
        cond, uncond = both[:rows], both[rows:]
        eps = uncond + cfg_scale * (cond - uncond)
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    std = (0.5 * log_variance).exp()
    return mean + std * temperature * noise * (index > 0)


# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: right
# why: the network is called twice under guidance
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    timestep, channels = tables["timesteps"][index], x.shape[1]
    output = denoiser(x, timestep, c[:len(x)])
    eps, fraction = output[:, :channels], output[:, channels:]
    if len(c) > len(x):
        without = denoiser(x, timestep, c[len(x):])[:, :channels]
        eps = cfg_scale * eps + (1 - cfg_scale) * without
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    if int(index) == 0:
        return mean
    return mean + temperature * torch.exp(log_variance / 2) * noise


# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: right
# why: torch.where for the last step, einsum for the guidance
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    copies = len(c) // len(x)
    output = denoiser(x.repeat(copies, 1), tables["timesteps"][index], c)
    output = output.unflatten(0, (copies, len(x))).unflatten(-1, (2, x.shape[1]))
    eps, fraction = output[0, :, 0], output[0, :, 1]
    if copies == 2:
        eps = output[1, :, 0] + (eps - output[1, :, 0]) * cfg_scale
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    noisy = torch.addcmul(mean, log_variance.exp().sqrt() * temperature, noise)
    return torch.where(index == 0, mean, noisy)


# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: mutant
# why: the network is told the index of the table instead of the timestep
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    rows, t = len(x), index
    if len(c) == rows:
        eps, fraction = denoiser(x, t, c).chunk(2, dim=-1)
    else:
        both, fraction = denoiser(torch.cat([x, x]), t, c).chunk(2, dim=-1)
        fraction = fraction[:rows]
        cond, uncond = both[:rows], both[rows:]
        eps = uncond + cfg_scale * (cond - uncond)
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    std = (0.5 * log_variance).exp()
    return mean + std * temperature * noise * (index > 0)


# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: mutant
# why: the variance is that of the unconditional half
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    rows, t = len(x), tables["timesteps"][index]
    if len(c) == rows:
        eps, fraction = denoiser(x, t, c).chunk(2, dim=-1)
    else:
        both, fraction = denoiser(torch.cat([x, x]), t, c).chunk(2, dim=-1)
        fraction = fraction[rows:]
        cond, uncond = both[:rows], both[rows:]
        eps = uncond + cfg_scale * (cond - uncond)
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    std = (0.5 * log_variance).exp()
    return mean + std * temperature * noise * (index > 0)


# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: mutant
# why: noise is added after the last step too
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    rows, t = len(x), tables["timesteps"][index]
    if len(c) == rows:
        eps, fraction = denoiser(x, t, c).chunk(2, dim=-1)
    else:
        both, fraction = denoiser(torch.cat([x, x]), t, c).chunk(2, dim=-1)
        fraction = fraction[:rows]
        cond, uncond = both[:rows], both[rows:]
        eps = uncond + cfg_scale * (cond - uncond)
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    std = (0.5 * log_variance).exp()
    return mean + std * temperature * noise


# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: mutant
# why: temperature multiplies the variance instead of the noise
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    rows, t = len(x), tables["timesteps"][index]
    if len(c) == rows:
        eps, fraction = denoiser(x, t, c).chunk(2, dim=-1)
    else:
        both, fraction = denoiser(torch.cat([x, x]), t, c).chunk(2, dim=-1)
        fraction = fraction[:rows]
        cond, uncond = both[:rows], both[rows:]
        eps = uncond + cfg_scale * (cond - uncond)
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    std = (0.5 * log_variance).exp()
    return mean + std * temperature ** 0.5 * noise * (index > 0)


# file: d2c.py
# function: denoising_step
# exercise: reverse
# kind: mutant
# why: the two means are guided instead of eps: another result where the clip bites
def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    rows, t = len(x), tables["timesteps"][index]
    if len(c) == rows:
        eps, fraction = denoiser(x, t, c).chunk(2, dim=-1)
    else:
        both, fraction = denoiser(torch.cat([x, x]), t, c).chunk(2, dim=-1)
        fraction = fraction[:rows]
        cond, uncond = both[:rows], both[rows:]
        eps = cond
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    if len(c) != rows:
        other, _ = posterior_step(x, uncond, fraction, tables, index, clip)
        mean = other + cfg_scale * (mean - other)
    std = (0.5 * log_variance).exp()
    return mean + std * temperature * noise * (index > 0)


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: right
# why: counts down with an index made anew at each level
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    draws = iter(noise)
    x = next(draws)
    tables = schedule_tables(steps, x.device, x.dtype)
    for i in range(steps - 1, -1, -1):
        index = torch.tensor([i], device=x.device)
        fresh = next(draws)[:len(x)]
        x = step(denoiser, x, c, fresh, tables, index, temperature, cfg_scale, clip)
    return x


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: right
# why: all draws taken at once, arguments by name
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    source = iter(noise)
    start, *fresh = [next(source) for _ in range(steps + 1)]
    tables, latent = schedule_tables(steps, start.device, start.dtype), start
    for level, draw in zip(reversed(range(steps)), fresh):
        latent = step(denoiser=denoiser, x=latent, c=c, noise=draw[:start.shape[0]], tables=tables,
                      index=torch.full((1,), level, device=start.device), temperature=temperature,
                      cfg_scale=cfg_scale, clip=clip)
    return latent


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: right
# why: a while loop over a tensor of indices, noise cut by narrow
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    noise, x = iter(noise), None
    x = next(noise).clone()
    rows, tables = x.size(0), schedule_tables(steps, x.device, x.dtype)
    index = torch.tensor([steps - 1], device=x.device)
    while index >= 0:
        x = step(denoiser, x, c, next(noise).narrow(0, 0, rows), tables, index, temperature, cfg_scale, clip)
        index = index - 1
    return x


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: mutant
# why: goes through the levels upwards
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    draws = iter(noise)
    x = next(draws)
    tables = schedule_tables(steps, x.device, x.dtype)
    for i in range(steps):
        index = torch.tensor([i], device=x.device)
        fresh = next(draws)[:len(x)]
        x = step(denoiser, x, c, fresh, tables, index, temperature, cfg_scale, clip)
    return x


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: mutant
# why: takes the second half of draws of 2M rows
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    draws = iter(noise)
    x = next(draws)
    tables = schedule_tables(steps, x.device, x.dtype)
    for i in range(steps - 1, -1, -1):
        index = torch.tensor([i], device=x.device)
        fresh = next(draws)[-len(x):]
        x = step(denoiser, x, c, fresh, tables, index, temperature, cfg_scale, clip)
    return x


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: mutant
# why: counts the kept levels by their timesteps: index is the level among the 1000
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    draws = iter(noise)
    x = next(draws)
    tables = schedule_tables(1000, x.device, x.dtype)
    for i in range(steps - 1, -1, -1):
        index = torch.tensor([round(i * 999 / (steps - 1))], device=x.device)
        fresh = next(draws)[:len(x)]
        x = step(denoiser, x, c, fresh, tables, index, temperature, cfg_scale, clip)
    return x


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: mutant
# why: temperature and guidance exchanged
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    draws = iter(noise)
    x = next(draws)
    tables = schedule_tables(steps, x.device, x.dtype)
    for i in range(steps - 1, -1, -1):
        index = torch.tensor([i], device=x.device)
        fresh = next(draws)[:len(x)]
        x = step(denoiser, x, c, fresh, tables, index, cfg_scale, temperature, clip)
    return x


# file: d2c.py
# function: diffusion_sample
# exercise: reverse
# kind: mutant
# why: the last draw, which is not used, is not drawn either: what follows in the stream moves up
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    draws = iter(noise)
    x = next(draws)
    tables = schedule_tables(steps, x.device, x.dtype)
    for i in range(steps - 1, -1, -1):
        index = torch.tensor([i], device=x.device)
        fresh = next(draws)[:len(x)] if i else torch.zeros_like(x)
        x = step(denoiser, x, c, fresh, tables, index, temperature, cfg_scale, clip)
    return x
