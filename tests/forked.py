"""Commands in forks of this process, which has imported torch once: hundreds of them in minutes. Not for Windows."""

import contextlib
import io
import os
import re
import resource
import select
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, namedtuple
from pathlib import Path

import torch
import torch._dynamo  # what commands import late would be imported in every fork
import torch.utils.tensorboard
import torchvision.utils  # noqa: F401
from PIL import Image

from drawn_faces import draw_face

TRAIN = shlex.split("""--size 32 --ngf 4 --ndf 4 --batch-size 2 --steps 6 --checkpoint-every 2 --log-every 1
    --sample-every 3 --precision fp32 --device cpu --workers 1""")  # a small training
End = namedtuple("End", "status output peak seconds")  # status: minus a signal's number; bytes; of work


class Strike:
    """Sends signals to the process that it is armed in, the first at the nth `moment`, the next some calls later."""

    def __init__(self, signals=(), moment="call", nth=0, later=0):
        self.signals, self.moment, self.nth, self.later, self.seen = list(signals), moment, nth, later, Counter()

    def note(self, moment, written=None):
        self.seen[moment] += 1
        if self.signals and moment == self.moment and self.seen[moment] > self.nth:
            self.nth, self.moment = self.seen["call"] + self.later, "call"
            if isinstance(written, io.BufferedWriter) and self.signals[0] == signal.SIGKILL:
                written.truncate(written.tell() // 2)  # as if it came in the middle
            os.kill(os.getpid(), self.signals.pop(0))

    def watch(self, owner, name):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            self.note(f"before {name}")
            function(*args, **kwargs)
            self.note(f"after {name}", args[-1])

        setattr(owner, name, watched)

    def arm(self):
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (torch, "save")):
            self.watch(owner, name)
        sys.setprofile(lambda frame, event, argument: self.note("call") if "call" in event else None)


def begin(module, argv, folder, before=None, after=None, **limits):
    """Start a script's main(argv) in `folder`. Returns (process id, pipe with its output).

    before, after: called there before and after it.  limits: of resources, such as FSIZE=1000.
    """
    ours, theirs = os.pipe()
    if process := os.fork():
        os.close(theirs)
        return process, ours
    status = 70
    try:
        os.close(ours), os.dup2(theirs, 1), os.dup2(theirs, 2), os.close(theirs), os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [module.__file__, *argv]
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        before and before()
        status = module.main(argv)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        sys.setprofile(None)
        os.write(2, traceback.format_exc().encode())
    finally:
        after and after()
        os._exit(status)


def end(process, pipe, seconds=300):  # of a busy machine; what hangs does so for ever
    """Read a command's output until it ends, and return its End."""
    output, deadline = b"", time.monotonic() + seconds
    while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
        if not (data := os.read(pipe, 65536)):
            break
        output += data
    else:
        os.kill(process, signal.SIGKILL)
        output += f"\nTraceback: none, but it hung for {seconds} s".encode()
    os.close(pipe)
    _, status, usage = os.wait4(process, 0)
    seconds = usage.ru_utime + usage.ru_stime
    return End(os.waitstatus_to_exitcode(status), output.decode(errors="replace"), usage.ru_maxrss * 1024, seconds)


def draw_faces(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(draw_face(i, 32)).save(folder / f"{i:03d}.png")


def equal(a, b):
    """Whether nested dicts and lists of tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def campaign(parser, prepare, play):
    """Play --rounds rounds, and print what fell short and how often, by kind. Returns the exit status.

    prepare: makes in an empty folder what all rounds share, and returns it.
    play: called with a round's seed, its folder and that; returns (kind, figures, faults): a string, a Counter and a
    list of strings.
    """
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; --rounds 1 does it again alone")
    args, table = parser.parse_args(), {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, contextlib.suppress(KeyboardInterrupt):  # which ends it with figures
        shared = prepare(Path(root))
        for seed in range(args.seed, args.seed + args.rounds):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                kind, figures, faults = play(seed, Path(folder), shared)
            table.setdefault(kind, Counter()).update(figures | Counter({"rounds": 1, "with faults": bool(faults)}))
            for fault in faults:
                print(f"seed {seed}, {kind}: {re.sub(root, '', fault)}", flush=True)
    rows = [*sorted(table.items()), ("all", sum(table.values(), Counter()))]
    columns = list(dict.fromkeys(["rounds", "with faults", *(name for _, row in rows for name in row)]))
    print("kind".ljust(16), *columns, sep="  ")
    for kind, row in rows:
        print(kind.ljust(16), *(f"{row[name]:>{len(name)}}" for name in columns), sep="  ")
    return bool(rows[-1][1]["with faults"])
