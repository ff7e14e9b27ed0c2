"""Hard use: killed, torn, starved and misused programs lose nothing, say what is wrong in one line, and go on."""
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import d2c
import fid
import sample
import tokenizers
import train
from test_fid import error_of
from test_scripts import TINY, Bomb, contents, load, refused, truncate
from tokenizers import ImageArray, ImageFolder, InputError, open_images

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def half(finished, data, tmp_path, monkeypatch):
    """A run whose encoding was cut off after its first batch, and the command that makes it whole."""
    (tmp_path / "half").mkdir()
    for name in ("tokenizers.pt", "stage0.pt"):
        shutil.copy(finished / name, tmp_path / "half")
    command = ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "half"), "--stage", "0"]
    encode, left = tokenizers.VQTokenizer.encode, iter(range(2))
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.VQTokenizer, "encode", lambda *a: encode(*a) if next(left) + 1 else None)
        patch.setattr(train.time, "time", iter(range(0, 10**6, 10)).__next__)
        with pytest.raises((StopIteration, RuntimeError)):
            train.main(command)
    return tmp_path / "half", command


def tiny(*arguments, **more):
    more.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # the tests may run by nohup
    return subprocess.Popen([sys.executable, TINY, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)


def until(process, words):
    """Read lines until one holds `words`; returns it."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(process.stderr.read())


def endless(out, data, stage=1):
    return ["train", "--preset", "tiny", "--data", data, "--out", out, "--stage", stage, "--steps", "1000000"]


# Nothing good is lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--data", "shapes"], ["--preset", "demo"]])
def test_a_command_that_is_refused_has_touched_nothing(run, half, flags, capsys):
    for folder in (run, half[0]):
        before = contents(folder)
        refused(train.main, [*half[1][:-4], "--out", folder, "--stage", "0", *flags], capsys, flags[0][2:], "--out")
        assert contents(folder) == before


def test_what_was_begun_goes_only_when_there_is_room_for_what_replaces_it(half, data, monkeypatch, capsys):
    folder, command = half
    file = load(folder / "tokenizers.pt")
    file["id"] = "another"  # so that the encoding must start again
    torch.save(file, folder / "tokenizers.pt")
    before, calls = contents(folder), iter(range(2))

    def full(*arguments):
        if next(calls):  # at the second array
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(train.main, command, capsys, "No space left")
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["codes.npy", "moments.npy", "labels.npy", "done.npy"])
def test_half_an_encoding_that_lost_its_end_is_refused(half, finished, name, capsys):
    folder, command = half
    whole = (folder / "tokens" / name).read_bytes()
    for bad in (whole[:-2], whole[:40], b""):
        (folder / "tokens" / name).write_bytes(bad)
        refused(train.main, command, capsys, folder / "tokens", "delete it")
        assert (folder / "tokens" / name).read_bytes() == bad
    (folder / "tokens" / name).write_bytes(whole)
    train.main(command)
    assert contents(folder / "tokens") == contents(finished / "tokens")


@pytest.mark.parametrize("script", ["train.py", "sample.py", "fid.py"])
def test_ctrl_c_during_the_imports(script):
    process = subprocess.Popen([sys.executable, ROOT / script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd="/", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_sampling_says_so(finished, tmp_path, number, monkeypatch, capsys):
    monkeypatch.setattr(sample.Pipeline, "batch", lambda *a: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run by nohup
    with pytest.raises(SystemExit) as stop:
        sample.main(["--run", str(finished), "--out", str(tmp_path / "a.npz")])
    signal.signal(number, before)
    assert stop.value.code == 128 + number and "goes on where it can" in capsys.readouterr().err


def test_a_closed_terminal_saves_and_nohup_goes_on(run, data):
    process = tiny(*endless(run, data))
    until(process, "stage 1  step")
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGHUP and "run the same command again" in said
    process = tiny(*endless(run, data), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    for _ in range(2):
        until(process, "stage 1  step")
        process.send_signal(signal.SIGHUP)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_processes_look_for_signals_by_the_clock(monkeypatch):
    """Every five seconds of the slowest process: at every step where steps are slow, seldom where they are fast."""
    processes = train.Processes("cpu")
    assert train.agree_to_stop([], 7, 60.0, processes) == (0, 8)
    processes.size = 2
    for seconds, steps in ((60.0, 1), (2.0, 2), (0.5, 10), (1e-6, 100)):
        monkeypatch.setattr(processes, "gather", lambda x: torch.cat([x, torch.tensor([[15, seconds]])]))
        assert train.agree_to_stop([], 7, 1e-6, processes) == (15, 7 + steps)


@pytest.mark.parametrize("log", ["closed pipe", "full disk"])
def test_a_lost_log_ends_nothing(finished, data, tmp_path, log):
    command = [sys.executable, TINY, "train", "--preset", "tiny", "--data", data, "--out", tmp_path / "run", "--steps",
               "30", "--save-every", "5"]
    if log == "full disk":
        with open("/dev/full", "w") as full:
            process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, text=True)
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    ours, undisturbed = load(tmp_path / "run" / "stage2.pt"), load(finished / "stage2.pt")
    assert all(torch.equal(ours["ema"][name], value) for name, value in undisturbed["ema"].items())


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_ends_a_stage_it_is_saved_first(run, data, workers, monkeypatch, capsys):
    """A picture that cannot be read; a reading process that is killed, for want of memory, in the middle of an update."""
    before, read, decay = load(run / "stage1.pt"), train.read_codes, train.ema_decay
    (run / "stage1.pt").unlink()
    command = ["--preset", "tiny", "--data", data, "--out", run, "--stage", "1", "--steps", "30", "--workers", workers]

    def broken(cache, index, generator, chance):
        if broken.left == 0:
            raise InputError("a.png: broken")
        broken.left -= 1
        return read(cache, index, generator, chance)

    def kill(step, longest):
        if step == 11:
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.5)
        return decay(step, longest)

    broken.left = 8 + 8 * 11 + 3  # the held-out batch, eleven batches, three pictures
    monkeypatch.setattr(train, *(("ema_decay", kill) if workers else ("read_codes", broken)))
    refused(train.main, command, capsys, "reads data was killed" if workers else "a.png: broken")
    assert load(run / "stage1.pt")["step"] in (range(12, 16) if workers else (11,))
    monkeypatch.undo()
    train.main([str(word) for word in command])
    after = load(run / "stage1.pt")
    assert all(torch.equal(after["ema"][name], value) for name, value in before["ema"].items())


def test_two_commands_on_one_folder(run, data, tmp_path, capsys):
    """The second is refused in a clear line, and leaves everything alone; a killed one leaves no lock."""
    first = tiny(*endless(run, data))
    until(first, "stage 1  step")
    refused(train.main, ["--preset", "tiny", "--out", run, "--stage", "2"], capsys, run, "another command is at work")
    assert (run / "lock").exists()
    first.kill()
    first.wait()
    train.main(["--preset", "tiny", "--data", str(data), "--out", str(run), "--stage", "2", "--steps", "31"])
    assert not (run / "lock").exists()
    first = tiny("sample", "--run", run, "--num", "100000", "--out", tmp_path / "a.npz")
    until(first, "pictures")
    time.sleep(0.5)
    refused(sample.main, ["--run", run, "--out", tmp_path / "a.npz"], capsys, "a.npz", "another command is at work")
    sample.main(["--run", str(run), "--num", "2", "--out", str(tmp_path / "b.npz")])
    first.kill()
    first.wait()
    sample.main(["--run", str(run), "--num", "2", "--out", str(tmp_path / "a.npz")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "run"]


def test_files_that_only_look_like_ours_are_left_alone(run, tmp_path, capsys):
    """A file called lock, also behind a link; and a checkpoint on another disk stays there."""
    (tmp_path / "mine").write_text("precious")
    (run / "lock").symlink_to(tmp_path / "mine")
    train.main(["--preset", "tiny", "--out", str(run), "--stage", "1", "--steps", "30"])
    assert (tmp_path / "mine").read_text() == "precious" and (run / "lock").is_symlink()
    (run / "stage1.pt").rename(tmp_path / "elsewhere.pt")
    (run / "stage1.pt").symlink_to(tmp_path / "elsewhere.pt")
    train.main(["--preset", "tiny", "--out", str(run), "--stage", "1", "--steps", "31"])
    assert (run / "stage1.pt").is_symlink() and load(tmp_path / "elsewhere.pt")["step"] == 31


# Numbers that are not numbers ----------------------------------------------------------------------------------------


def test_moments_that_float16_cannot_hold_are_not_encoded(half, data, capsys):
    folder, command = half
    file = load(folder / "tokenizers.pt")
    file["kl"]["quant_conv.weight"] *= 1e9  # as a rate far too high would make them: finite, and useless
    torch.save(file, folder / "tokenizers.pt")
    refused(train.main, command, capsys, folder / "tokenizers.pt", "float16", "--lr")
    assert not (folder / "tokens" / "meta.json").exists()


def spoiled(file, path):
    """The file with one NaN or inf in its first tensor under `path`."""
    part = file
    for name in path:
        part = part[name]
    key = next(key for key, value in part.items() if isinstance(value, torch.Tensor) and value.is_floating_point())
    part[key].flatten()[0] = math.nan if len(path) % 2 else math.inf
    return key


@pytest.mark.parametrize("name, path", [("tokenizers.pt", ["vq"]), ("tokenizers.pt", ["kl"]), ("stage1.pt", ["ema"]),
                                        ("stage1.pt", ["model"]), ("stage2.pt", ["optimizers", 0, "state", 0])])
def test_weights_that_are_not_finite_are_named(run, data, name, path, tmp_path, capsys):
    file = load(run / name)
    key = spoiled(file, path)
    torch.save(file, run / name)
    stage = name[5] if name.startswith("stage") else "1"
    words = [run / name, f"{path[0]}.", key, "not finite"]
    refused(train.main, ["--preset", "tiny", "--out", run, "--stage", stage, "--steps", "40"], capsys, *words)
    refused(sample.main, ["--run", run, "--num", "2"], capsys, *words)
    if path == ["vq"]:
        torch.save(file["vq"], tmp_path / "vq.pt")
        torch.save(file["kl"], tmp_path / "kl.pt")
        refused(train.main, ["--preset", "tiny", "--data", data, "--out", tmp_path / "new", "--vq", tmp_path / "vq.pt",
                             "--kl", tmp_path / "kl.pt"], capsys, tmp_path / "vq.pt", key, "not finite")


def test_pictures_that_are_not_finite_are_not_saved(finished, tmp_path, capsys):
    refused(sample.main, ["--run", finished, "--num", "2", "--temperature2", "1e20", "--out", tmp_path / "a.npz"], capsys,
            "not finite", "--temperature2")
    assert not (tmp_path / "a.npz").exists()


# Valid or nearly valid input -----------------------------------------------------------------------------------------


def arrays(path, **more):
    """An .npz of eight pictures, with some arrays replaced."""
    images = np.stack([tokenizers.Shapes(16)[i][0] for i in range(8)])
    np.savez(path, **(dict(images=images, labels=np.arange(8) % 4) | more))
    return path


def test_arrays_in_fortran_order(tmp_path):
    plain = ImageArray(arrays(tmp_path / "a.npz"), 16)
    turned = ImageArray(arrays(tmp_path / "b.npz", images=np.asfortranarray(plain.images)), 16)
    assert all(np.array_equal(plain[i][0], turned[i][0]) for i in range(8))
    torch.utils.data.default_collate([turned[i] for i in range(8)])
    assert tokenizers.center_crop(turned.images[0], 8).shape == (8, 8, 3)
    ours, theirs = (fid.read_set(str(tmp_path / name)).images for name in ("a.npz", "b.npz"))
    assert np.array_equal(ours[2:5], theirs[2:5]) and np.array_equal(ours[6:], theirs[6:])


def test_odd_npz_files_of_pictures(tmp_path, capsys):
    def refuse(*words, **changed):
        began = time.time()
        with pytest.raises(InputError) as error:
            ImageArray(arrays(tmp_path / "a.npz", **changed), 16)
        assert time.time() - began < 2
        for word in ("a.npz", *words):
            assert word in str(error.value)

    for label in (10**9, 2**63 - 1, 2**64 - 1):
        refuse(f"up to {label}", labels=np.array([0] * 7 + [label], np.uint64))
    for shape in ((8, 16, 0, 3), (8, 0, 16, 3), (0, 16, 16, 3)):
        refuse("images are uint8", images=np.zeros(shape, np.uint8), labels=np.arange(8)[:shape[0]])
    refuse("labels", labels=np.array(3))
    refuse("classes", labels=np.array([0] * 7 + [9]), classes=["ant", "bee"])
    with zipfile.ZipFile(arrays(tmp_path / "b.npz"), "a") as archive:
        archive.writestr("images", b"no array")  # a member without .npy
    for name in ("images", "labels"):
        with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
            for each in ("images", "labels"):
                archive.writestr(f"{each}.npy", b"no array" if each == name else npy(np.zeros((8, 2, 2, 3), np.uint8)))
        refused(train.main, ["--preset", "tiny", "--data", tmp_path / "c.npz", "--out", tmp_path / "r"], capsys, "c.npz")
    assert len(ImageArray(arrays(tmp_path / "d.npz", labels=np.array([0, 1, 2, 255] * 2)), 16).classes) == 256


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("shape", ["(10**12, 8, 8, 3)", "(-8, 8, 8, 3)", "(8, -8, -8, 3)", "(8, 2**70, 8, 3)",
                                   "(8, 8, 0, 3)", "(9, 8, 8, 3)", "(7, 8, 8, 3)", "(8, 8, 3)", "()"])
def test_headers_that_promise_something_else(shape, tmp_path, capsys):
    good = npy(np.zeros((8, 8, 8, 3), np.uint8))
    text = repr(eval(shape)).encode()
    bad = good[:10] + good[10:128].replace(b"(8, 8, 8, 3)", text)[:117].ljust(117) + b"\n" + good[128:]
    for name in ("images", "arr_0"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr(f"{name}.npy", bad)
            archive.writestr("labels.npy", npy(np.arange(8)))
        assert "a.npz" in error_of(capsys, str(tmp_path / "a.npz"), "--metrics", "IS")
    with pytest.raises(InputError):
        ImageArray(tmp_path / "a.npz", 8)


def test_named_pipes_are_not_waited_for(finished, tmp_path, capsys):
    (tmp_path / "data" / "ant").mkdir(parents=True)
    for name in ("data/ant/x.png", "x.npz", "x.pt", "x.png"):
        os.mkfifo(tmp_path / name)
    train_with = ["--preset", "tiny", "--out", tmp_path / "run", "--data"]
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / "ant" / f"{i}.png")
    refused(train.main, [*train_with, tmp_path / "data"], capsys, "x.png", "no regular file")
    refused(train.main, [*train_with, tmp_path / "x.npz"], capsys, "x.npz")
    refused(train.main, [*train_with, "shapes", "--vq", tmp_path / "x.pt", "--kl", tmp_path / "x.pt"], capsys, "x.pt")
    refused(sample.main, ["--run", finished, "--from", tmp_path / "x.png", "--out", tmp_path / "o.png"], capsys, "x.png")
    refused(sample.main, ["--run", finished, "--out", tmp_path / "x.npz"], capsys, "x.npz")
    for name in ("data", "x.npz"):
        assert "no regular file" in error_of(capsys, str(tmp_path / name), "--metrics", "IS")


def test_other_formats_are_not_handed_to_other_programs(tmp_path, monkeypatch, capsys):
    """Pillow opens EPS by Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **b: pytest.fail("another program was started"))
    (tmp_path / "data" / "ant").mkdir(parents=True)
    for i in range(4):
        Image.new("L", (16, 16)).save(tmp_path / "data" / "ant" / f"{i}.png", "EPS")
    refused(train.main, ["--preset", "tiny", "--data", tmp_path / "data", "--out", tmp_path / "run"], capsys, ".png",
            "cannot identify")
    assert "cannot identify" in error_of(capsys, str(tmp_path / "data"), "--metrics", "IS")


@pytest.mark.parametrize("name", ["tokenizers.pt", "stage1.pt", "stage2.pt", "tokens/meta.json"])
def test_entries_that_are_missing_or_of_another_kind(run, name, tmp_path, capsys):
    """Each in turn, also those of `run`, the config and the settings: one line or no matter, and never a traceback."""
    path = run / name
    whole = json.loads(path.read_text()) if name.endswith("json") else load(path)
    before = path.read_bytes()
    stage = name[5] if name.startswith("stage") else "1"
    commands = [(train.main, ["--preset", "tiny", "--out", run, "--stage", stage, "--steps", "30"])]
    if not name.endswith("json"):
        commands.append((sample.main, ["--run", run, "--num", "1", "--steps", "1", "--diffusion-steps", "2", "--out",
                                       tmp_path / "a.npz"]))
    parts = [[]] + [[key] for key in ("run", "config", "sample", "vq_config", "kl_config") if key in whole]
    tried, refusals, changes = 0, 0, itertools.cycle(("text", 0, [], -3, math.nan, torch.zeros(7, 3), 3))
    for part in parts:
        for key in list(whole[part[0]] if part else whole):
            if key in ("model", "ema", "optimizers", "vq", "kl"):
                continue
            for change in ("gone", next(changes), next(changes)):
                if name.endswith("json"):
                    file = json.loads(before)
                    change = None if isinstance(change, torch.Tensor) else change
                else:
                    file = load(io.BytesIO(before))
                inside = file[part[0]] if part else file
                inside.pop(key) if change == "gone" else inside.update({key: change})
                path.write_text(json.dumps(file)) if name.endswith("json") else torch.save(file, path)
                for main, command in commands[1 if part in (["config"], ["sample"]) else 0:]:  # training reads no such
                    try:
                        main([str(word) for word in command])
                    except SystemExit as stop:
                        assert stop.code == 2
                    err = capsys.readouterr().err
                    assert len(err.splitlines()) <= 1, err
                    tried, refusals = tried + 1, refusals + bool(err)
                path.write_bytes(before)
    assert refusals > tried // 3


@pytest.mark.parametrize("change", [dict(exp_avg=torch.zeros(7, 3)), dict(exp_avg=None), dict(step=torch.zeros(21)),
                                    dict(more=torch.zeros(1))])
def test_the_state_of_optimizers_must_fit(run, change, capsys):
    """Torch does not look, and may crash."""
    file = load(run / "stage1.pt")
    state = file["optimizers"][0]["state"][0]
    state.update(change)
    if None in change.values():
        del state["exp_avg"]
    torch.save(file, run / "stage1.pt")
    refused(train.main, ["--preset", "tiny", "--out", run, "--stage", "1", "--steps", "40"], capsys, "stage1.pt",
            "optimizer")


def test_tokens_of_no_row_of_the_codebook(run, data, tmp_path, monkeypatch, capsys):
    codes = np.load(run / "tokens" / "codes.npy", allow_pickle=False)
    codes[1, 5, 3] = 60000
    np.save(run / "tokens" / "codes.npy", codes)
    refused(train.main, ["--preset", "tiny", "--out", run, "--stage", "1", "--steps", "40"], capsys, run / "tokens")
    preset = dict(d2c.PRESETS["tiny"], vq=dict(d2c.PRESETS["tiny"]["vq"], codebook_size=2**16 + 1))
    monkeypatch.setitem(d2c.PRESETS, "tiny", preset)
    refused(train.main, ["--preset", "tiny", "--data", data, "--out", tmp_path / "new"], capsys, "65537 rows", "16 bits")


def test_files_that_want_to_run_code_are_told_in_one_line(run, tmp_path, capsys):
    """TorchScript, old and new pickles; what they want to run is named."""
    command = ["--preset", "tiny", "--out", run, "--stage", "1", "--init", tmp_path / "init.pt"]
    (run / "stage1.pt").unlink()
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "init.pt")
    for again in (lambda: torch.save({"model": Bomb(tmp_path / "fallen")}, tmp_path / "init.pt"),
                  lambda: torch.save({"model": Bomb(tmp_path / "fallen")}, tmp_path / "init.pt",
                                     _use_new_zipfile_serialization=False), None):
        process = tiny("train", *command)
        out, err = process.communicate()
        assert process.returncode == 2 and len(err.splitlines()) == 1 and "init.pt" in err, err
        if again:
            again()
    assert "Unsupported global: GLOBAL" in err and "open" in err and "\x1b" not in err, err
    assert not (tmp_path / "fallen").exists()


def test_a_folder_that_cannot_be_written_is_found_out_at_once(data, tmp_path, finished, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", "/proc/run"):
        refused(train.main, ["--preset", "tiny", "--data", data, "--out", place], capsys, place, "--out")
        refused(sample.main, ["--run", finished, "--out", f"{place}/a.png"], capsys, place, "--out")
    assert "stage 0" not in capsys.readouterr().out


def test_a_kill_between_the_last_checkpoint_and_its_log(run, data, monkeypatch):
    """The log comes first, so that it is never short."""
    (run / "stage1.pt").unlink()
    log, save = (run / "stage1.csv").read_text(), torch.save
    command = ["--preset", "tiny", "--data", str(data), "--out", str(run), "--stage", "1", "--steps", "30",
               "--save-every", "10"]

    def killed(file, path):
        if file["step"] == 30:
            raise KeyboardInterrupt
        save(file, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(SystemExit):
            train.main(command)
    assert load(run / "stage1.pt")["step"] == 20
    train.main(command)
    assert len((run / "stage1.csv").read_text().splitlines()) == len(log.splitlines()) == 31


def test_a_kill_between_the_pictures_and_the_clearing_up(finished, tmp_path, monkeypatch, capsys):
    command = ["--run", str(finished), "--num", "4", "--out", str(tmp_path / "a.npz")]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **b: exec("raise KeyboardInterrupt"))
        with pytest.raises(SystemExit):
            sample.main(command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.partial"]
    sample.main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert "there already" in capsys.readouterr().out


# Wrong pictures, silently --------------------------------------------------------------------------------------------


def test_classes_without_pictures_are_not_sampled(tmp_path, capsys):
    data, run = arrays(tmp_path / "a.npz", labels=np.array([0, 1, 2, 255] * 2)), tmp_path / "run"
    train.main(["--preset", "tiny", "--data", str(data), "--out", str(run), "--steps", "2", "--batch-size", "2"])
    assert "8 pictures of 4 classes (and 252 classes without pictures" in capsys.readouterr().out
    pipeline = sample.Pipeline.from_run(run)
    assert len(pipeline.classes) == 256 and pipeline.trained == [0, 1, 2, 255]
    seen = []
    pipeline.batch = lambda labels, *rest: seen.extend(labels) or [None, np.zeros((len(labels), 16, 16, 3), np.uint8)]
    parser, args = sample.parse(["--run", str(run), "--out", str(tmp_path / "a.npz")])
    args.out = tmp_path / "b.npz"
    sample.sample(pipeline, args, train.Processes("cpu"))
    assert seen == [0, 1, 2, 255] * 3
    for flag in ("--classes", "--from"):
        photo = ["--from", ROOT / "docs" / "demo.png"] if flag == "--from" else []
        refused(sample.main, ["--run", run, "--classes", "7", *photo], capsys, "--classes 7", "no picture")


def test_data_is_known_by_what_it_holds_not_where_it_lies(half, finished, data, tmp_path, capsys):
    folder, command = half
    moved = tmp_path / "moved" / "pictures.npz"
    moved.parent.mkdir()
    shutil.copy(data, moved)
    (tmp_path / "link.npz").symlink_to(moved)
    with np.load(data, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    images[5, 0, 0, 0] ^= 1
    np.savez(tmp_path / "changed.npz", images=images, labels=labels)
    before = contents(folder)
    refused(train.main, [*command, "--data", tmp_path / "changed.npz"], capsys, "made with data", data, "changed.npz")
    assert contents(folder) == before
    train.main([*command, "--data", str(tmp_path / "link.npz")])
    assert "goes on after 64 of 120" in capsys.readouterr().out
    assert contents(folder / "tokens").keys() == contents(finished / "tokens").keys()
    train.main([*command, "--data", str(moved)])
    shutil.copy(tmp_path / "changed.npz", moved)
    refused(train.main, [*command, "--data", moved], capsys, "made with data", "--out")


def test_data_that_is_not_named_again_must_not_have_changed(half, data, tmp_path, capsys):
    folder, command = half
    shutil.copy(data, tmp_path / "d.npz")
    file = load(folder / "tokenizers.pt")
    file["run"]["data"] = train.identity(str(tmp_path / "d.npz"))
    torch.save(file, folder / "tokenizers.pt")
    arrays(tmp_path / "d.npz")
    refused(train.main, [*command[:2], *command[4:]], capsys, "made with data", "d.npz")


def test_a_run_does_not_lie_in_its_data(tmp_path, capsys):
    root = pictures(tmp_path / "data")
    for out in (root, root / "run"):
        refused(train.main, ["--preset", "tiny", "--data", root, "--out", out], capsys, "--out", "--data")
    before = train.identity(str(root))
    (root / "ant" / "Thumbs.db").write_text("no picture")
    assert train.identity(str(root)) == before


def test_a_folder_is_known_by_the_names_and_sizes_of_its_files(tmp_path):
    pictures(tmp_path / "a")
    before = train.identity(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    ids = [train.identity(str(tmp_path / name)).rpartition("[")[2] for name in "abc"]
    assert len(set(ids)) == 1 and before.startswith(str(tmp_path / "a"))
    (tmp_path / "b" / "ant" / "0.png").rename(tmp_path / "b" / "ant" / "9.png")
    assert train.identity(str(tmp_path / "b")).rpartition("[")[2] != ids[0]


def pictures(root, classes=("ant", "bee"), count=2):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(root / name / f"{i}.png")
    return root


def test_what_is_a_picture(tmp_path, capsys):
    root = pictures(tmp_path / "data")
    for name in ("ant/._0.png", ".DS_Store", "ant/.ipynb_checkpoints/0.png", ".git/x.png", "ant/note.txt", "bee/x.gif",
                 "loose.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((root / "ant" / "0.png").read_bytes())
    pictures(tmp_path / "elsewhere", ["more"], 5)
    (root / "ant" / "link").symlink_to(tmp_path / "elsewhere")
    shutil.copy(root / "ant" / "1.png", root / "bee" / "2.JFIF")
    images = ImageFolder(root, 16)
    assert images.classes == ["ant", "bee"] and images.labels.tolist() == [0] * 7 + [1] * 3
    assert images.note == "; 3 other files passed over"
    folder = fid.Folder(root)
    assert len(folder) == 11 and folder.others == 2
    assert next(fid.caveats(fid.ImageSet("data", folder), fid.ImageSet(), ["IS"], None)).startswith("data: 2 files")
    (root / "bee" / "round").symlink_to(root / "bee")
    (root / "cow").symlink_to(tmp_path / "elsewhere")  # known already, by another name
    for find in (tokenizers.find_files, fid.find_files):
        assert len(find(root)) == 18  # not twice through one loop, and not for ever
        assert [path.name for path in find(f"{tmp_path}/elsewhere/")] == [f"{i}.png" for i in range(5)]
    pictures(tmp_path / "imagenet", ["train", "val"])
    assert "did you mean" in ImageFolder(tmp_path / "imagenet", 16).note


@pytest.mark.parametrize("find", [tokenizers.find_files, fid.find_files])
def test_a_folder_that_cannot_be_read_is_an_error(find, tmp_path, monkeypatch):
    pictures(tmp_path)
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError, match="bee"):
        find(tmp_path)


def test_a_preset_that_was_edited_meanwhile(run, monkeypatch, capsys):
    preset = d2c.PRESETS["tiny"]
    monkeypatch.setitem(d2c.PRESETS, "tiny", dict(preset, stage1=dict(preset["stage1"], num_heads=4)))
    refused(train.main, ["--preset", "tiny", "--out", run, "--stage", "1", "--steps", "40"], capsys, "stage1.pt", "sizes")


def test_empty_words(run, data, capsys, tmp_path, monkeypatch):
    for flag in ("--init", "--data", "--vq", "--out", "--data="):
        words = [flag] if flag.endswith("=") else [flag, ""]
        refused(train.main, ["--preset", "tiny", "--stage", "1", *words], capsys, flag.strip("="), "empty")
    for flag in ("--classes", "--run", "--out", "--from", "--vq"):
        refused(sample.main, ["--run", run, flag, ""], capsys, flag, "empty")
    refused(sample.main, ["--run", run, "--classes", ","], capsys, "--classes ,")
    monkeypatch.chdir(tmp_path)
    assert open_images("shapes", 16).note == ""
    pictures(tmp_path / "shapes")
    assert "./shapes" in open_images("shapes", 16).note and len(open_images("./shapes", 16)) == 4


# Other machines ------------------------------------------------------------------------------------------------------


def test_names_that_the_terminal_cannot_show(tmp_path):
    """Latin-1 folder names in a UTF-8 world, letters that ASCII has not: the run ends well, and the names survive."""
    data, run = tmp_path / "data", tmp_path / "run"
    names = [b"caf\xe9", "Käse".encode(), "猫".encode(), b"plain"]
    for name in names:
        folder = os.path.join(os.fsencode(data), name)
        os.makedirs(folder)
        for i in range(3):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(os.fsdecode(folder) + f"/{i}.png")
    environment = dict(os.environ, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    for command in (["train", "--preset", "tiny", "--data", data, "--out", run, "--steps", "2", "--batch-size", "2"],
                    ["sample", "--run", run, "--num", "4"], ["sample", "--run", run, "--classes", "nobody"]):
        process = tiny(*command, env=environment)
        out, err = process.communicate()
        assert "Traceback" not in err and process.returncode == (2 if "nobody" in command else 0), err
    assert (run / "samples.png").exists() and "caf" in err


def test_class_names_of_all_kinds(tmp_path, capsys):
    with pytest.raises(InputError, match="1 classes"):
        ImageArray(arrays(tmp_path / "a.npz", classes=np.array("ants")), 16)
    classes = np.array(["salt, pepper", "Käse", "a", "b"])
    for array in (classes, np.char.encode(classes, "utf-8")):
        assert ImageArray(arrays(tmp_path / "a.npz", classes=array), 16).classes == classes.tolist()
    names = classes.tolist()
    assert sample.choose_classes(["salt, pepper", "a,b"], names, [0, 1, 2, 3]) == [0, 2, 3]
    assert sample.choose_classes(["Käse,", "3"], names, [0, 1, 2, 3]) == [1, 3]


def test_titles_of_a_grid_stay_in_their_columns():
    def column(title):
        return np.asarray(tokenizers.draw_grid(np.zeros((1, 2, 16, 16, 3), np.uint8), ["", title], ["fine"]))

    for title in ("a very long name of a class that has no room", "猫" * 40):
        sheet = column(title)
        assert (sheet[:18, :-96] == 255).all()
    assert np.array_equal(column("Käse"), column("Kase")) and np.array_equal(column("猫"), column(""))


def test_a_clock_that_stands_still(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "time", lambda: 1e9)
    train.main(["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2"])
    sample.main(["--run", str(tmp_path / "run"), "--num", "9", "--out", str(tmp_path / "a.npz")])


@pytest.mark.parametrize("variables", [dict(WORLD_SIZE="2"), dict(WORLD_SIZE="2", RANK="0"), dict(WORLD_SIZE="two"),
                                       dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2"),
                                       dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2",
                                            MASTER_ADDR="localhost", MASTER_PORT="99999999")])
def test_a_world_size_that_nobody_meant(variables, tmp_path, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for main in (train.main, sample.main):
        refused(main, [], capsys, "WORLD_SIZE", "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "1")
    assert train.Processes("cpu").rank == 0


def test_another_package_called_tokenizers(tmp_path):
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").write_text("class Tokenizer: pass\n")
    for script in ("train", "sample"):
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import {script}"
        error = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path).stderr
        assert "ImportError" in error and "Hugging Face" in error.splitlines()[-1], error


@pytest.mark.parametrize("lost", ["closed pipe", "full disk", "nothing"])
def test_fid_without_an_output(tmp_path, lost):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    command = [sys.executable, ROOT / "fid.py", tmp_path / "a.npz", "--ref", tmp_path / "a.npz", "--metrics", "FID"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if lost == "full disk" else os.devnull, "w") as file:
        output = writer if lost == "closed pipe" else file
        result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    said = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
    assert result.returncode == (0 if lost == "nothing" else 2) and len(said) == (lost != "nothing"), said
