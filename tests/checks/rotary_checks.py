"""Exercise 2: rotary positions."""
import torch

from checking import golden, normal, same, true

TABLE, TOKENS = ("place", "pair", "cos or sin"), ("picture", "head", "token", "number")


def table(grid, head_dim, place=lambda row, column, w: (row, column), exponent=lambda i, d: 4 * i / d, halves=True,
          across=False, class_token=0.0):
    """The table by loops; the arguments make the likely mistakes."""
    h, w = grid
    quarter, rows = head_dim // 4, torch.full((1 + h * w, head_dim // 2, 2), class_token)
    for row in range(h):
        for column in range(w):
            for pair in range(2 * quarter):
                half, i = divmod(pair, quarter) if halves else (pair % 2, pair // 2)
                angle = torch.tensor(place(row, column, w)[half] / 10000 ** exponent(i, head_dim), dtype=torch.float64)
                rows[1 + (column * h + row if across else row * w + column), pair] = torch.stack(
                    [angle.cos(), angle.sin()]).float()
    return rows


def likely_tables(grid, head_dim):
    """{what a mistake looks like: its table}."""
    ones = table(grid, head_dim)
    ones[0, :, 0] = 1
    return {
        "the column turns the first half of the pairs, and the row the second":
            lambda: table(grid, head_dim, place=lambda row, column, w: (column, row)),
        "the places are in the order column by column instead of row by row":
            lambda: table(grid, head_dim, across=True),
        "rows and columns are exchanged in the order of places and in the halves":
            lambda: table(grid, head_dim, place=lambda row, column, w: (column, row), across=True),
        "row and column take turns among the pairs instead of having one half each":
            lambda: table(grid, head_dim, halves=False),
        "all pairs turn with the number of the place, as in one dimension":
            lambda: table(grid, head_dim, place=lambda row, column, w: 2 * (row * w + column,)),
        "rows and columns are counted from 1": lambda: table(grid, head_dim, place=lambda r, c, w: (r + 1, c + 1)),
        "is right for other frequencies: the exponent is 2i / head_dim":
            lambda: table(grid, head_dim, exponent=lambda i, d: 2 * i / d),
        "is right for other frequencies: the exponent is i / (head_dim/2)":
            lambda: table(grid, head_dim, exponent=lambda i, d: i / (d / 2)),
        "is right for other frequencies: the exponent is 2i / (head_dim/4)":
            lambda: table(grid, head_dim, exponent=lambda i, d: 8 * i / d),
        "is right for other frequencies: multiplied, not divided": lambda: table(grid, head_dim,
                                                                                 exponent=lambda i, d: -4 * i / d),
        "holds (sin, cos) instead of (cos, sin)": lambda: ones.flip(-1).index_fill(0, torch.tensor([0]), 0),
        "the class token is not turned, but it should vanish": lambda: ones}


def table_of_the_original(s):
    """The table equals LlamaGen's for a 4 x 4 grid"""
    same(s.d2c.rotary_table((4, 4), 32), golden("gpt_tiny")["freqs_cis"][:, :16], "rotary_table((4, 4), 32)", TABLE,
         wrong=likely_tables((4, 4), 32))


def table_of_any_grid(s):
    """The table is right for grids that are not square, and for narrow heads"""
    for grid, head_dim in (((3, 5), 12), ((5, 3), 12), ((2, 7), 20), ((1, 3), 8), ((3, 1), 8), ((4, 2), 4),
                           ((2, 3), 64)):
        same(s.d2c.rotary_table(grid, head_dim), table(grid, head_dim), f"rotary_table({grid}, {head_dim})", TABLE,
             wrong=likely_tables(grid, head_dim))


def class_token_vanishes(s):
    """The first entry of the table is zero, and all others are points of the unit circle"""
    found = s.d2c.rotary_table((2, 3), 8)
    true(len(found) == 7, f"rotary_table((2, 3), 8) has {len(found)} entries, should have one per place and one more")
    true(not found[0].any(), "the first entry of the table, the class token's, is not all zero")
    same(found[1:].norm(dim=-1), torch.ones(6, 4), "cos^2 + sin^2", TABLE[:2])
    same(s.d2c.rotate(normal(2, 3, 1, 8), found[:1]), torch.zeros(2, 3, 1, 8), "rotate with the class token's entry",
         TOKENS)


def turned(x, angles, length=1.0):
    """x, its neighbours as complex numbers, times length * e^(i angle); in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    factors = torch.polar(length * torch.ones_like(angles), angles)
    return torch.view_as_real(pairs * factors.to(pairs)).flatten(-2).float()


def entries(angles):
    return torch.stack([angles.cos(), angles.sin()], -1)


def likely_turns(x, angles):
    """{what a mistake looks like: its result}."""
    halves = lambda y: torch.cat([y[..., ::2], y[..., 1::2]], -1)  # noqa: E731
    back = lambda y: y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # noqa: E731
    return {"turns in the wrong direction": lambda: turned(x, -angles),
            "number i is paired with number i + head_dim/2; pairs are neighbours":
                lambda: halves(turned(back(x), angles)),
            "the pairs are right, but their numbers no longer lie side by side": lambda: halves(turned(x, angles)),
            "the two numbers of each pair are exchanged": lambda: turned(x, angles).unflatten(-1, (-1, 2)).flip(
                -1).flatten(-2),
            "is not turned at all": lambda: x,
            "multiplies by the cosine only": lambda: x * angles.cos().repeat_interleave(2, -1),
            "all tokens are turned by the angles of the first": lambda: turned(x, angles[:1].expand_as(angles)),
            "all tokens are turned by the angles of the last": lambda: turned(x, angles[-1:].expand_as(angles))}


def turning_is_a_complex_product(s):
    """rotate multiplies the pairs, as complex numbers, with the table"""
    for batch, heads, length, head_dim in ((2, 3, 5, 8), (3, 2, 1, 4), (1, 1, 4, 12)):
        x, angles = normal(batch, heads, length, head_dim, seed=1), 2 * normal(length, head_dim // 2, seed=2)
        same(s.d2c.rotate(x, entries(angles)), turned(x, angles), f"rotate, x {tuple(x.shape)}", TOKENS,
             wrong=likely_turns(x, angles))
    x, angles = normal(2, 3, 5, 8, seed=3), normal(5, 4, seed=4)
    same(s.d2c.rotate(x, 0.5 * entries(angles)), turned(x, angles, 0.5), "rotate, with entries of length 1/2", TOKENS,
         wrong={"the table's length is ignored (the class token's is zero)": lambda: turned(x, angles)})


def turning_leaves_its_input(s):
    """rotate takes x as attention makes it (a transposed view), leaves it as it is, and lets gradients through"""
    x, angles = normal(2, 5, 3, 8, seed=1), normal(5, 4, seed=2)
    before, given, table = x.clone(), x.transpose(1, 2), entries(angles)
    found, kept = s.d2c.rotate(given, table), table.clone()
    true(torch.equal(x, before), "rotate has changed its argument x")
    same(found, turned(given, angles), "rotate, x a transposed view", TOKENS)
    same(s.d2c.rotate(given, table), found, "rotate, called a second time", TOKENS)
    true(torch.equal(table, kept), "rotate has changed its argument table")
    given, weight = given.clone().requires_grad_(), normal(2, 3, 5, 8, seed=3)
    found = s.d2c.rotate(given, table)
    true(found.requires_grad, "no gradient passes through rotate")
    same(torch.autograd.grad((found * weight).sum(), given)[0], turned(weight, -angles), "gradient through rotate",
         TOKENS)


def scores_know_only_offsets(s):
    """The score of a query and a key depends on the offset of their places only, in rows and columns"""
    (h, w), head_dim = (3, 4), 16
    table = s.d2c.rotary_table((h, w), head_dim)[1:]
    q, k = (s.d2c.rotate(normal(1, 1, 1, head_dim, seed=seed).expand(1, 1, h * w, head_dim), table)[0, 0]
            for seed in (1, 2))
    by_offset = {}
    for i, row in enumerate(q @ k.T):
        for j, score in enumerate(row.tolist()):
            by_offset.setdefault((j // w - i // w, j % w - i % w), []).append(score)
    for (down, right), scores in by_offset.items():
        true(max(scores) - min(scores) < 1e-4, f"two places {down} rows and {right} columns apart have another score "
             "in another part of the grid; queries and keys must turn the same way, with the row and the column")
    true(len({round(scores[0], 3) for scores in by_offset.values()}) > len(by_offset) // 2,
         "different offsets have the same score")
    true(abs(by_offset[1, 0][0] - by_offset[0, 1][0]) > 1e-3, "one row down has the score of one column to the right")


CHECKS = [(2, table_of_the_original), (3, table_of_any_grid), (1, class_token_vanishes),
          (3, turning_is_a_complex_product), (1, turning_leaves_its_input), (2, scores_know_only_offsets)]
