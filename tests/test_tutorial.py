"""docs/tutorial.md: its figures come out of one command, its commands run, and the code on it is the real code."""
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark_demo
import d2c
import figures
import handins
import sample
import tokenizers
import train
from test_scripts import refused

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder in which the demo is trained, but with tiny sizes; few pictures stand behind each measured point."""
    monkeypatch.setattr(figures, "COUNT", 10)
    tiny = d2c.PRESETS["tiny"]
    patches = {name: dict(tiny[name], patch=8) for name in ("vq", "kl")}  # 4 x 4 places, as in the demo
    stage2 = dict(tiny["stage2"], guess_weight=1.0)
    monkeypatch.setitem(d2c.PRESETS, "demo", dict(tiny, size=32, stage2=stage2, **patches))
    monkeypatch.setattr(tokenizers.Shapes.__init__, "__defaults__", (120, 0))
    monkeypatch.setattr(benchmark_demo, "REFERENCE_COUNT", 200)
    monkeypatch.chdir(tmp_path)
    train.main([])
    return tmp_path


def test_every_figure_twice(small):
    """The same pixels each time, and small enough for a page."""
    figures.main([])
    figures.main(["--out", "again"])
    for name in [*figures.FIGURES, "curves"]:
        path = small / "runs" / "demo" / "figures" / f"{name}.png"
        with Image.open(path) as first, Image.open(small / "again" / f"{name}.png") as second:
            assert first.width <= 1000 and np.asarray(first).std() > 10, name
            assert np.array_equal(first, second), name


def test_stage2_streams_what_generate_returns(finished):
    """Figures and others may watch; nothing that is drawn changes later, and the last value is generate's."""
    pipeline = sample.Pipeline.from_run(finished, device="cpu")
    labels = torch.tensor([3, 7])
    written = [codes.clone() for codes in pipeline.discrete.stream(labels, generator=figures.seeded(pipeline))]
    assert len(written) == 16 and all((codes[:, i + 1:] == -1).all() for i, codes in enumerate(written))
    assert all((codes == written[-1])[codes >= 0].all() for codes in written)
    assert (pipeline.discrete.generate(labels, generator=figures.seeded(pipeline)) == written[-1]).all()
    drawn = figures.draw_latents(pipeline, labels, written[-1])
    counts = np.cumsum([count for count, _ in d2c.token_schedule(16, len(drawn), 1.0)])
    assert [int((latents != 0).any(-1).sum()) for latents in drawn] == [2 * count for count in counts]
    assert all((latents == drawn[-1])[latents != 0].all() for latents in drawn)


def test_the_loss_curves_of_any_run(finished, tmp_path, capsys):
    figures.main(["curves", "--run", str(finished), "--out", str(tmp_path)])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == 3 * 330
    refused(figures.main, ["curves", "--run", tmp_path], capsys, "no stage0.csv")
    (tmp_path / "stage1.csv").write_text("step,loss\n1,x\n")
    refused(figures.main, ["curves", "--run", tmp_path], capsys, "stage1.csv", "no log")
    refused(figures.main, ["mona_lisa"], capsys, "mona_lisa", "choose among tokenizers")


def test_commands_of_the_page(small):
    """Each one runs as printed; the figures' and the benchmark's commands are tested elsewhere."""
    scripts = {"train.py": train, "sample.py": sample, "tests/figures.py": figures,
               "tests/benchmark_demo.py": benchmark_demo}
    commands = re.findall(r"`?python ((?:\w+/)?\w+\.py)([^`\n#]*)", PAGE)
    assert len(commands) > 10
    Image.new("RGB", (60, 40), "red").save("photo.jpg")
    for name in ("star", "moon", "arrow"):
        shutil.copyfile("photo.jpg", f"{name}.png")
    for script, flags in commands:
        if not (script.startswith("tests") and flags.strip() in ("", "knobs", "lengths")):
            scripts[script].main(flags.split())
    assert all((small / name).exists() for name in ("photo.png", "photos.png", "loud.png", "once.png", "none.png"))


def test_the_plots_of_the_courses_hand_ins(small, monkeypatch, capsys):
    monkeypatch.setattr(handins, "COUNT", 10)
    monkeypatch.setattr(handins.codes_in_use, "__defaults__", (20,))
    handins.main([])
    for number in range(1, 11):
        with Image.open(small / "runs" / "demo" / "handins" / f"{number}.png") as image:
            assert np.asarray(image).std() > 10, number
    assert capsys.readouterr().out.count("\nsaved ") == 10


def test_the_page_is_short_and_quotes_the_code():
    source = "\n".join((ROOT / f"{name}.py").read_text() for name in ("tokenizers", "fusion", "d2c", "fid"))
    lines = {re.sub(r"  +#.*", "", line).strip() for line in source.splitlines()}
    assert len(PAGE.splitlines()) <= 450
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 7 and all(len(block.splitlines()) <= 12 for block in blocks)
    for line in "".join(blocks).splitlines():
        assert line.strip() in lines | {"", "..."}, line
    for name in re.findall(r"!\[.*?\]\((.*?)\)\n\n\*What to see", PAGE):
        assert (ROOT / "docs" / name).stat().st_size <= 100_000, name
    assert len(re.findall(r"!\[", PAGE)) == len(re.findall(r"\)\n\n\*What to see", PAGE)) == 9
    for heading in ("**Try:**", "**Question:**", "<summary>Answer</summary>"):
        assert PAGE.count(heading) == 9, heading
