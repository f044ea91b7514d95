"""End trainings at random and chosen moments, and see that nothing is lost: python tests/kill.py --rounds 300 --seed 0

Round i is decided by seed + i alone: `--rounds 1 --seed N` does one again. In each a small training (or packing, film,
export) is ended, or its disk is full, or another one starts in its folder, or nobody reads what it prints. Then: no
file under a final name is torn; the same command, given again, ends well and leaves no temporaries; at most one
checkpoint interval was lost; every step is logged once; and all that is saved equals an undisturbed run's, bit for bit.

A moment is the nth call of any function, or the nth file that is half written, synced, renamed or deleted. So a round
comes out the same each time. Not for Windows.
"""

import argparse
import logging
import mmap
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from forked import TRAIN, Strike, begin, campaign, draw_faces, end, equal
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import Dataset
import evaluate_models
import Interpolation
import Trainloop
from checkpoints import read_model_file, step_of
from packs import read_index

STEPS, EVERY = 6, 2
COMMANDS = {
    "train": (Trainloop, ["--data", "faces", "--cache", "cache", "--out", "run", "--resume", "auto", *TRAIN]),
    "pack": (Dataset, shlex.split("--data faces --cache cache --size 32 --workers 1 --out shown.png")),
    "film": (Interpolation, shlex.split("--model whole --seeds 1 2 --frames 9 --device cpu --out film.gif")),
    "export": (evaluate_models, shlex.split("whole --export face.pt --force --device cpu")),
}
SIGNALS = ["KILL", "KILL", "KILL", "TERM", "HUP", "INT", "INT INT"]
KINDS = ["train"] * 6 + ["pack", "film", "export", "full disk", "file limit", "two", "unread", "early"]


class Round:
    """A round in a folder of its own: `kind` and `what` say what was done, `faults` what fell short."""

    def __init__(self, seed, folder, shared):
        self.random, self.folder, (self.whole, self.seen) = random.Random(seed), folder, shared
        self.faults, self.figures, self.what, self.progress = [], Counter(disturbed=1), "", mmap.mmap(-1, 1)
        self.kind = self.random.choice(KINDS)
        name = self.kind if self.kind in COMMANDS else "train"
        shutil.copytree(self.whole.parent / "faces", folder / "faces")
        (folder / "whole").symlink_to(self.whole)
        self.signal(name) if self.kind in COMMANDS else getattr(self, self.kind.replace(" ", "_"))()
        done = end(*begin(*COMMANDS[name], self.folder))  # the same again, to its end
        self.expect(done.status == 0, f"again: {done}")
        self.check(done.output, again=True)
        if name == "train":
            self.compare()

    def expect(self, truth, fault):
        if not truth:
            self.faults.append(f"{self.what}: {fault}")

    def begin(self, strike=None, name="train", **limits):
        """Start a command with a strike; the step that it reaches is noted in self.progress, which is shared memory."""

        def before(train_step=Trainloop.train_step):
            def noted(state, *args):
                result = train_step(state, *args)
                self.progress[0] = state.step
                return result

            Trainloop.train_step = noted
            strike and strike.arm()

        return begin(*COMMANDS[name], self.folder, before, **limits)

    def check(self, output, again=False):
        """Check that there is no traceback, that all that has its name is whole, and what was lost or is left."""
        self.expect(not re.search("Traceback|Error:|Exception", output), f"output {output[-900:]}")
        for path in sorted(self.folder.rglob("*")):
            try:
                if "tmp-" in path.name:
                    self.expect(not again, f"{path.name} is left")
                elif path.suffix == ".pt":
                    self.figures["files read"] += 1
                    read_model_file(path)
                elif path.suffix in (".png", ".gif"):
                    with Image.open(path) as image:
                        image.seek(getattr(image, "n_frames", 1) - 1)
                        image.load()
                elif path.suffix == ".json":
                    self.expect(read_index(path.with_suffix(".u8")), f"{path.name} and its pack differ")
            except Exception as error:  # of many types, for a torn file
                self.expect(False, f"torn: {error}")
        newest = max(map(step_of, (self.folder / "run").glob("checkpoint_*.pt")), default=0)
        if not again:
            self.figures["steps lost"] = self.progress[0] - newest
            self.expect(self.progress[0] - newest <= EVERY, f"{self.progress[0] - newest} steps lost")
        return newest

    def compare(self):
        """Check that the run in the end is what nothing has disturbed."""
        files = [run / f"checkpoint_{STEPS:06d}.pt" for run in (self.folder / "run", self.whole)]
        if not files[0].is_file():
            return self.expect(False, "no last checkpoint")
        ours, theirs = map(read_model_file, files)
        for part in ("step", "generator", "critic", "ema", "optim_g", "optim_d", "rng"):
            self.expect(equal(ours[part], theirs[part]), f"{part} differs from the undisturbed run's")
        events = EventAccumulator(str(self.folder / "run"), size_guidance={"scalars": 0}).Reload()
        steps = [point.step for point in events.Scalars("loss/critic")]
        self.expect(steps == list(range(1, STEPS + 1)), f"logged steps {steps}")

    def strike(self, words, name="train"):
        """Return a Strike of signals at any call, or at a moment of files."""
        seen = self.seen[name]
        moment = self.random.choice([*["call"] * 4, *(moment for moment in sorted(seen) if moment != "call")])
        numbers = [getattr(signal, f"SIG{word}") for word in words.split()]
        strike = Strike(numbers, moment, self.random.randrange(seen[moment]), self.random.randrange(3000))
        self.what = f"{words} at {moment} {strike.nth} of {seen[moment]}"
        return strike

    def signal(self, name):
        """A signal, or two, at any moment; in half of the rounds over an earlier result."""
        words = self.random.choice(SIGNALS)
        if name != "train" and self.random.random() < 0.5:
            end(*begin(*COMMANDS[name], self.folder))
        done, first = end(*self.begin(self.strike(words, name), name)), getattr(signal, f"SIG{words.split()[0]}")
        self.kind, noted = f"{name}, {words}", "finishing the step" in done.output
        self.figures["disturbed"] = int(done.status != 0 or noted)
        allowed = (0, 130) if words[:3] == "INT" else (0, -first, 128 + first)
        self.expect(done.status in allowed, f"status {done.status}")
        newest = self.check(done.output)
        if noted and " " not in words:
            self.expect(newest == self.progress[0], f"{newest} saved, {self.progress[0]} done")

    # ---- other kinds ----------------------------------------------------------------------------------------------

    def file_limit(self):
        """No file may have more than some bytes."""
        self.what = self.random.randrange(600_000)
        self.out_of_room(FSIZE=self.what)

    def full_disk(self):
        """The disk of the run's folder is full. Only root can make a small one."""
        disk, self.what = self.folder / "run", 4 * self.random.randrange(1, 500)  # kB
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.what}k", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            self.figures["disturbed"] = 0
            return
        self.out_of_room()
        more = f"cp -a {disk} {disk}.more && umount {disk} && rmdir {disk} && mv {disk}.more {disk}"
        subprocess.run(more, shell=True, check=True)

    def out_of_room(self, **limits):
        done = end(*self.begin(**limits))
        self.figures["disturbed"] = int(done.status != 0)
        lines = [line for line in done.output.splitlines() if line.startswith("Trainloop.py: error: ")]
        self.expect(done.status == 0 or (done.status in (1, 2) and len(lines) == 1), done)
        self.expect(not lines or re.search(r"run|cache|\.png|--", lines[0]), f"names no file: {lines}")
        self.check(done.output)

    def two(self):
        """A second training in the folder of one that stands still at any call."""
        process, pipe = self.begin(self.strike("STOP"))
        stopped = os.WIFSTOPPED(os.waitpid(process, os.WUNTRACED)[1])
        second = end(*begin(*COMMANDS["train"], self.folder))
        stopped and os.kill(process, signal.SIGCONT)
        first, refused = end(process, pipe), "trains there already"
        self.figures["disturbed"] = int(second.status == 2)
        self.expect(second.status == 0 or re.search(f"process {process} .*{refused}", second.output), f"2nd: {second}")
        self.expect(first.status == 0 or refused in first.output, f"1st: {first}")
        self.check(first.output + second.output)

    def unread(self):
        """Nobody reads the output any more, from the start or after a while."""
        process, pipe = self.begin()
        self.what = self.random.choice([0, 1, 300])  # bytes
        self.what and os.read(pipe, self.what)
        os.close(pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.expect((status, self.check("")) == (0, STEPS), f"status {status}")

    def early(self):
        """Ctrl-C while Python still imports, in a process of its own."""
        module, argv = COMMANDS["train"]
        process = subprocess.Popen([sys.executable, module.__file__, *argv], cwd=self.folder, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        self.what = self.random.uniform(0.3, 3)  # seconds
        time.sleep(self.what)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
        self.expect(process.returncode in (0, 130, -signal.SIGINT), f"status {process.returncode}")
        self.check(output)


def prepare(root):
    """Do each command undisturbed; return the run's folder, and how many moments each command has."""
    seen = {}
    draw_faces(root / "faces", 20)
    (root / "whole").symlink_to(root / "run")
    for name, command in COMMANDS.items():
        strike = Strike()

        def after(strike=strike):
            sys.setprofile(None)
            (root / "seen").write_text(repr(dict(strike.seen)))

        done = end(*begin(*command, root, strike.arm, after))
        assert done.status == 0, done
        seen[name] = eval((root / "seen").read_text())
    return root / "run", seen


def play(seed, folder, shared):
    played = Round(seed, folder, shared)
    return played.kind, played.figures, played.faults


if __name__ == "__main__":
    logging.disable()  # TensorBoard tells of each purge
    sys.exit(campaign(argparse.ArgumentParser(description=__doc__.splitlines()[0]), prepare, play))
