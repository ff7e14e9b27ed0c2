# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: right
# why: place by place, in Python numbers
def rotary_table(grid, head_dim):
    pairs, (height, width) = head_dim // 2, grid
    entries = [[[0.0, 0.0]] * pairs]
    for row in range(height):
        for column in range(width):
            entry = []
            for number in (row, column):
                for i in range(pairs // 2):
                    angle = number / 10000 ** (2 * i / pairs)
                    entry.append([math.cos(angle), math.sin(angle)])
            entries.append(entry)
    return torch.tensor(entries, dtype=torch.float32)


# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: right
# why: complex numbers of length 1, rows and columns broadcast over the grid
def rotary_table(grid, head_dim):
    height, width = grid
    quarter = head_dim // 4
    periods = 10000.0 ** (torch.arange(quarter) / quarter)
    by_row = (torch.arange(height)[:, None] / periods)[:, None].expand(height, width, quarter)
    by_column = (torch.arange(width)[:, None] / periods)[None].expand(height, width, quarter)
    angles = torch.cat([by_row, by_column], dim=2).reshape(height * width, 2 * quarter)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.cat([torch.zeros_like(turns[:1]), turns]))


# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: right
# why: float64, row and column from the number of the place, filled into zeros
def rotary_table(grid, head_dim):
    places = torch.arange(grid[0] * grid[1])
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float64) / half
    scales = torch.exp(-math.log(10000) * exponents)
    row = torch.outer((places // grid[1]).double(), scales)
    column = torch.outer((places % grid[1]).double(), scales)
    table = torch.zeros(1 + len(places), half, 2)
    for slot, function in enumerate((torch.cos, torch.sin)):
        table[1:, :half // 2, slot] = function(row)
        table[1:, half // 2:, slot] = function(column)
    return table


# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: mutant
# why: the exponents divide by the whole head, as in one dimension
def rotary_table(grid, head_dim):
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / head_dim)
    places = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))
    angles = (places[..., None] * frequencies).flatten(1)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), table])


# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: mutant
# why: the class token gets the angle 0, that is cos 1 and sin 0
def rotary_table(grid, head_dim):
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    places = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))
    angles = torch.cat([torch.zeros(1, head_dim // 2), (places[..., None] * frequencies).flatten(1)])
    return torch.stack([angles.cos(), angles.sin()], -1)


# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: mutant
# why: row and column take turns, pair by pair
def rotary_table(grid, head_dim):
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    places = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))
    angles = (places[:, None] * frequencies[:, None]).flatten(1)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), table])


# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: mutant
# why: the zeros of the class token come last
def rotary_table(grid, head_dim):
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    places = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))
    angles = (places[..., None] * frequencies).flatten(1)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([table, torch.zeros(1, head_dim // 2, 2)])


# file: d2c.py
# function: rotary_table
# exercise: rotary
# kind: mutant
# why: places run down the columns
def rotary_table(grid, head_dim):
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    row, column = torch.meshgrid(*(torch.arange(size).float() for size in grid), indexing="xy")
    places = torch.stack([row.flatten(), column.flatten()], 1)
    angles = (places[..., None] * frequencies).flatten(1)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), table])


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: right
# why: a product of complex numbers
def rotate(x, table):
    kind = torch.promote_types(x.dtype, table.dtype)
    numbers = torch.view_as_complex(x.to(kind).unflatten(-1, (-1, 2)).contiguous())
    turns = torch.view_as_complex(table.to(kind).contiguous())
    return torch.view_as_real(numbers * turns).flatten(3).to(x.dtype)


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: right
# why: a 2 x 2 matrix per pair
def rotate(x, table):
    cos, sin = table[..., 0], table[..., 1]
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    b, heads, t, d = x.shape
    pairs = x.reshape(b, heads, t, d // 2, 2).to(torch.promote_types(x.dtype, table.dtype))
    turned = torch.einsum("tpij,bhtpj->bhtpi", matrices.to(pairs.dtype), pairs)
    return turned.reshape(x.shape).to(x.dtype)


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: right
# why: each number and its partner in the pair
def rotate(x, table):
    cos, sin = (part.repeat_interleave(2, dim=-1) for part in (table[..., 0], table[..., 1]))
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign = torch.tensor([-1.0, 1.0], device=x.device).repeat(x.shape[-1] // 2)
    return (x * cos + sign * partner * sin).to(x.dtype)


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: mutant
# why: pairs are numbers i and i + head_dim/2
def rotate(x, table):
    a, b = x.chunk(2, -1)
    cos, sin = table.unbind(-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: mutant
# why: the pairs do not stay where they are: all first numbers, then all second ones
def rotate(x, table):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: mutant
# why: a reflection: one sign of the matrix is wrong
def rotate(x, table):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos + b * sin, a * sin - b * cos], -1).flatten(-2).to(x.dtype)


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: mutant
# why: cuts pairs wrongly: the number of pairs in the last axis is 2
def rotate(x, table):
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


# file: d2c.py
# function: rotate
# exercise: rotary
# kind: mutant
# why: the angles of the first token for all tokens
def rotate(x, table):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[0].unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)
