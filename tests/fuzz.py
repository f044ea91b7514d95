"""Feed spoiled files and odd command lines to the real commands: python tests/fuzz.py --rounds 3000 --seed 0

Round i is decided by seed + i alone: `--rounds 1 --seed N` does one again. In each a good checkpoint, model, pack, zip,
picture, partition list or note is damaged, in its fields or its bytes, or made odd, or flags are drawn at random. Then:
all is well, or one line tells which flag or file is wrong; no traceback; under 20 seconds of work and 4 GB; after an
error nothing lies under a final name; nothing in a pickle runs; a model that is taken holds the numbers that were
saved; where a run's newest checkpoint is spoiled, the one before is taken. Not for Windows.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import contextlib

import torch
from forked import TRAIN, begin, campaign, draw_faces, end, equal
from spoil import JSON, ODD, VALUES, Called, damage_fields, draw_picture, spoil

import Dataset
import download_model
import evaluate_models
import Interpolation
import metrics
import Trainloop
from checkpoints import read_model_file
from command_line import UserError
from training_state import check_checkpoint

KINDS = ["checkpoint", "checkpoint", "run folder", "model", "pack", "zip", "picture", "partition list", "note", "flags"]
FINAL = (".pt", ".gif", ".mp4", ".webp", ".md", ".sha256", ".png", ".csv")
COMMANDS = {
    Trainloop: [*TRAIN, "--steps", "1", "--data", "faces"],
    Interpolation: ["--model", "whole.pt", "--frames", "2", "--device", "cpu", "--out", "film.gif"],
    evaluate_models: ["run", "--figures-only", "--device", "cpu"],
    Dataset: ["--data", "faces", "--size", "32", "--out", "shown.png"],
    download_model: ["--list"],
}


class Means(torch.nn.Module):
    """A fast extractor: mean colours."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)  # (N, 12)


class Round:
    """A round in a folder of its own: `kind` and `what` say what was done, `faults` what fell short."""

    def __init__(self, seed, folder, shared):
        self.rand, self.folder, (self.root, self.known) = random.Random(seed), folder, shared
        self.kind, self.what, self.faults, self.must_pass = self.rand.choice(KINDS), "", [], False
        for name in ("run", "bests"):
            shutil.copytree(self.root / name, folder / name)
        shutil.copy(self.root / "bests/generator_32.pt", folder / "whole.pt")
        (folder / "faces").symlink_to(self.root / "faces")
        module, *argv = getattr(self, self.kind.replace(" ", "_"))()
        before = self.finals()
        done = end(*begin(module, argv, folder, AS=24 * 10**9, FSIZE=10**9))
        self.what += f", {Path(module.__file__).name} {argv}"
        self.figures = Counter(refused=int(done.status != 0))
        self.judge(Path(module.__file__).name, argv, done, self.finals() - before)

    def expect(self, truth, fault):
        if not truth:
            self.faults.append(f"{self.what[:300]}: {str(fault)[-800:]}")

    def finals(self):
        found = [path for path in self.folder.rglob("*") if path.suffix in FINAL and path.is_file()]
        found = [path for path in found if path.parent.name != "evaluation"]  # a table is good in itself
        return {(path.name, path.stat().st_mtime_ns) for path in found}

    def judge(self, script, argv, done, written):
        lines = [line for line in done.output.splitlines() if line.startswith(f"{script}: error: ")]
        self.expect("Traceback" not in done.output, done.output)
        self.expect(done.status in (0, 1, 2) and len(lines) == (done.status != 0), done)
        names = [Path(word).name for word in argv] + os.listdir(self.folder) + os.listdir(self.folder / "run")
        for line in lines:
            named = re.search(r" --?\w|arguments|error: models: ", line) or any(name and name in line for name in names)
            self.expect(named and len(line) < 1000, f"names no flag or file, or is long: {line}")
        self.expect(done.status != 2 or not written, f"{written} in spite of {done.output}")
        self.expect(done.status == 0 or not self.must_pass, f"refused: {done.output}")
        self.expect(done.seconds < 20, f"{done.seconds:.0f} s of work")
        self.expect(done.peak < 4e9 or self.kind == "flags", f"{done.peak / 1e9:.1f} GB")  # flags may ask for it
        self.expect(not (self.folder / "ran").exists(), "what a pickle names was run")

    def spoil_model(self, path):
        """Damage a model file's fields or bytes, or put a pickle in its place that calls something."""
        act, good = self.rand.choice(["fields"] * 5 + ["bytes"] * 3 + ["pickle"]), read_model_file(path)
        self.what = f"{act} of {path.name}"
        if act == "fields":
            self.what += damage_fields(self.rand, good, ODD)
            torch.save(good, path)
        elif act == "pickle":
            calls = [(os.system, f"touch {self.folder}/ran"), (torch.nn.Linear, 40000, 30000), (bytearray, 10**10)]
            call = Called(*self.rand.choice(calls))
            torch.save(self.rand.choice([call, good | {"step": call}, [call]]), path)
        else:
            self.what += spoil(self.rand, path)
            with contextlib.suppress(UserError):
                self.expect(equal(read_model_file(path), good), "other numbers are taken")

    # ---- kinds: each spoils something and returns the script and its command line -----------------------------------

    def checkpoint(self):
        path = self.folder / "run/checkpoint_000004.pt"
        self.spoil_model(path)
        news = ["--start-from", path, *TRAIN[2:], "--steps=1"], ["--grow-from", path, "--steps=1", "--batch-size=2"]
        more = self.rand.choice([["--resume", path, "--steps=5"]] * 3 + [*news])
        return Trainloop, "--data", "faces", "--cache", str(self.root / "cache"), "--out", "new", *map(str, more)

    def run_folder(self):
        newest = self.folder / "run/checkpoint_000004.pt"
        self.spoil_model(newest)
        try:
            check_checkpoint(read_model_file(newest), newest)
        except UserError:
            self.must_pass = True
        return Trainloop, "--data", "faces", "--cache", str(self.root / "cache"), "--resume", "run", "--steps", "5"

    def model(self):
        path = self.folder / "run/generator_000004.pt"
        self.spoil_model(path)
        film = Interpolation, "--model", str(path), "--frames=2", "--device=cpu", "--out=film.gif"
        return self.rand.choice([film, (evaluate_models, str(path), "--export=shared.pt"),
                                 (evaluate_models, "run", "--figures-only", "--device=cpu")])  # fmt: skip

    def pack(self):
        shutil.copytree(self.root / "cache", self.folder / "cache")
        index, self.must_pass = next((self.folder / "cache").glob("*.json")), True
        if self.rand.random() < 0.6:
            content = json.loads(index.read_text())
            self.what = damage_fields(self.rand, content, JSON)
            index.write_text(json.dumps(content))
        else:
            self.what = spoil(self.rand, self.rand.choice([index, index.with_suffix(".u8")]))
        return Dataset, "--data", "faces", "--cache", "cache", "--size", "32", "--out", "shown.png"

    def zip(self, listed=None):
        """A zip of faces that is damaged, or packed in any way."""
        path, methods = self.folder / "faces.zip", [0, 8, 12, 14, 97, 9]
        method = self.rand.choice(methods[:4])
        with zipfile.ZipFile(path, "w", method) as archive:
            for _i, face in enumerate(sorted((self.root / "faces").iterdir())):
                archive.write(face, self.rand.choice(["", "a/b/", "/", "../", "__MACOSX/", "ü/"]) + face.name)
            archive.writestr("list_eval_partition.txt", listed or "".join(f"{i:03d}.png {i % 3}\n" for i in range(30)))
        if listed is None or self.rand.random() < 0.3:
            self.what = spoil(self.rand, path)
        return Dataset, "--data", path.name, "--split", self.rand.choice(["all", "train"]), *COMMANDS[Dataset][2:]

    def picture(self):
        """One picture of any kind, or what looks like one, among good ones: it is read or left out by name."""
        pictures, self.must_pass = self.folder / "pictures", True
        shutil.copytree(self.root / "faces", pictures)
        self.what = draw_picture(self.rand, pictures)
        return Dataset, "--data", "pictures", *COMMANDS[Dataset][2:]

    def partition_list(self):
        text = "".join(f"{i:03d}.png {i % 3}\n" for i in range(30))
        forms = [
            text.encode("utf-16"),
            text.encode("utf-16-le"),
            text.replace(" ", ",").encode(),
            text.encode("utf-8-sig"),
        ]
        forms += [b"\n" * 10**8, b" " * 10**7, b"0" * 10**7, b"x" * 6 * 10**7, text.replace("\n", "\r").encode()]
        path = self.folder / "list_eval_partition.txt"
        path.write_bytes(self.rand.choice([text.encode()] * 9 + forms))
        self.what = spoil(self.rand, path) if path.stat().st_size < 10**4 else f"{path.read_bytes()[:20]}"
        if self.rand.random() < 0.5:
            return self.zip(path.read_bytes())
        shutil.copytree(self.root / "faces", self.folder / "pictures")
        if self.rand.random() < 0.1:
            os.truncate(path, 5 * 10**9)
        return Dataset, "--data", "pictures", "--split", "train", *COMMANDS[Dataset][2:]

    def note(self):
        """The note beside a model that is to be shared."""
        note = self.folder / "bests/generator_32.json"
        content = json.loads(note.read_text())
        self.what = damage_fields(self.rand, content, JSON)
        note.write_text(json.dumps(content))
        if self.rand.random() < 0.4:
            self.what = spoil(self.rand, note)
        if self.rand.random() < 0.5:
            return evaluate_models, "bests/generator_32.pt", "--export", "shared.pt"
        return (evaluate_models, "run", "--by", "critic", "--data", "faces", "--cache", str(self.root / "cache"),
                "--quick", "--samples", "8", "--features", "mobilenet_v2", "--device", "cpu")  # fmt: skip

    def flags(self):
        """A few flags with any values, before or behind those that make the command work."""
        module = self.rand.choice(list(COMMANDS))
        odd = []
        for _ in range(self.rand.choice([1, 1, 2, 3])):
            odd += [self.rand.choice(self.known[module])] + self.rand.choices(
                VALUES, k=self.rand.choice([0, 1, 1, 1, 2])
            )
        odd = [word for word in odd if word not in ("--download", "--steps")]
        argv = [*odd, *COMMANDS[module]] if self.rand.random() < 0.3 else [*COMMANDS[module], *odd]
        return module, *argv


def prepare(root):
    """Make good files of each kind, and read which flags there are."""
    metrics.load_face_detector = lambda device: None
    metrics.load_extractor = lambda *_: Means()
    draw_faces(root / "faces", 30)
    calls = [(Trainloop, [*TRAIN, "--data", "faces", "--cache", "cache", "--out", "run", "--steps", "4"])]
    calls += [(evaluate_models, ["run", "--by", "critic", "--data", "faces", "--cache", "cache", "--quick", "--samples",
                                 "8", "--features", "mobilenet_v2", "--device", "cpu"])]  # fmt: skip
    for module, argv in calls:
        done = end(*begin(module, argv, root))
        assert done.status == 0, done
    helps = {module: end(*begin(module, ["--help"], root)).output for module in COMMANDS}
    return root, {module: re.findall(r"--[a-z][\w-]+", text) for module, text in helps.items()}


def play(seed, folder, shared):
    played = Round(seed, folder, shared)
    return played.kind, played.figures, played.faults


if __name__ == "__main__":
    sys.exit(campaign(argparse.ArgumentParser(description=__doc__.splitlines()[0]), prepare, play))
