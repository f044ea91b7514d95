"""download_model.py against a local server that misbehaves, and load_generator on files like those of the report."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import gdown
import pytest
import torch

import download_model
from checkpoints import load_generator, read_model_file
from command_line import UserError
from Generator import Generator

NAME = "generator_model_batch_12000.pt"
PAGE = b"\n <!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"

# Plays the report's training script: a class Generator in a module Generator, pickled whole.
WRITER = """
import sys, types
from collections import OrderedDict
import torch
from torch import nn
class Generator(nn.Module):
    def __init__(self, ngf=8, kernel=4):
        super().__init__()
        self.linear = nn.Linear(100, 4 * 4 * 512)
        widths = [512, ngf * 8, ngf * 4, ngf * 2, ngf, ngf // 2]
        for i in range(1, 6):
            setattr(self, f"convT{i}", nn.ConvTranspose2d(*widths[i - 1:i + 1], kernel, 2, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.conv = nn.Conv2d(ngf // 2, 3, 3, 1, 1)
    def forward(self, z):
        x = self.linear(z).reshape(-1, 512, 4, 4)
        for i in range(1, 6):
            x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"convT{i}")(x)))
        return torch.tanh(self.conv(x))
class Hook:
    __reduce__ = lambda self: (open, ("hook_ran", "w"))
Generator.__module__ = "Generator"
sys.modules["Generator"] = types.ModuleType("Generator")
sys.modules["Generator"].Generator = Generator
torch.manual_seed(0)
model = Generator()
model(torch.randn(8, 100))  # moves BatchNorm's running statistics off 0 and 1
model(torch.randn(8, 100) * 2)
torch.save(model, "generator_model_batch_12000.pt")
z = torch.randn(5, 100)
with torch.no_grad():
    torch.save({"z": z, "images": model.eval()(z)}, "reference.pt")
linear, kernel, wide = nn.Linear(100, 8192), Generator(kernel=6), Generator(ngf=16)
relu, missing, extra, eps, shape, hook = (Generator() for _ in range(6))
relu.relu, extra.extra, eps.bn2.eps = nn.ReLU(), nn.Linear(1, 1), 0.1
shape.conv.weight = nn.Parameter(torch.zeros(3, 4, 5, 5))  # and kernel_size still says 3
del missing.bn3
hook._forward_hooks[0] = Hook()
for name in "linear kernel wide relu missing extra eps shape hook".split():
    torch.save(globals()[name], name + ".pt")
torch.load("hook.pt", weights_only=False)  # leaves hook_ran, so the file is as bad as it should be
# What torch 2.0 put into a module's pickle: OrderedDicts, and none of the attributes that came later.
LATER = ["_forward_hooks_always_called"]
for module in model.modules():
    old = {key: value for key, value in vars(module).items() if key not in LATER}
    vars(module).clear()
    vars(module).update({key: OrderedDict(value) if type(value) is dict else value for key, value in old.items()})
torch.save(model, "old_torch.pt")
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder of files as the report's code would have written them, with ngf 8 instead of 128."""
    folder = tmp_path_factory.mktemp("report")
    subprocess.run([sys.executable, "-c", WRITER], cwd=folder, check=True)
    return folder


@pytest.fixture
def server(monkeypatch):
    """A server of `files` ({path: bytes}), which hangs up after `cut` bytes and fails on the paths in `broken`.

    With it the published generator has the ngf of the files in `report`.
    """
    count = sum(p.numel() for p in Generator(ngf=8, stem_norm=False).parameters())
    monkeypatch.setattr(download_model, "PUBLISHED_PARAMETERS", count)
    state = SimpleNamespace(files={}, cut=None, broken=(), seen=[])

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): ...

        def do_GET(self):
            state.seen.append(self.path)
            if self.path in state.broken or self.path not in state.files:
                return self.send_error(503 if self.path in state.broken else 404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.files[self.path])))
            self.end_headers()
            self.wfile.write(state.files[self.path][: state.cut])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{httpd.server_port}"
        yield state
        httpd.shutdown()


def get(server, folder, *more):
    return download_model.main(["12000", "--from", server.url, "--out", str(folder), *more])


OTHERS = [
    ("kernel.pt", r"its convT1 is .*kernel_size=\(6, 6\)"), ("eps.pt", "its bn2 is .*eps=0.1"),
    ("missing.pt", "its layers are linear"), ("extra.pt", "its layers are .*extra"),
    ("linear.pt", "its layers are none"), ("shape.pt", "size mismatch for to_rgb.128.weight"),
    ("relu.pt", "names torch.nn.modules.activation.ReLU; nothing"), ("hook.pt", "open; nothing in it was run"),
]  # fmt: skip


def test_another_module_is_refused_and_nothing_in_it_runs(report, monkeypatch):
    monkeypatch.chdir(report)
    (report / "hook_ran").unlink()
    for name, reason in OTHERS:
        with pytest.raises(UserError, match=reason) as error:
            load_generator(report / name)
        assert "\n" not in str(error.value) and not (report / "hook_ran").exists()


@pytest.mark.parametrize("source", [NAME, "old_torch.pt"])
def test_report_file_is_converted_and_gives_the_same_picture_bit_for_bit(report, server, tmp_path, capsys, source):
    server.files[f"/{NAME}"] = content = (report / source).read_bytes()
    assert get(server, tmp_path / "models") == 0
    assert os.listdir(tmp_path / "models") == [NAME]
    file = torch.load(tmp_path / "models" / NAME, weights_only=True)  # plain types: no class needs to be allowed
    assert file["format"] == 1 and file["step"] == 12000 and file["settings"]["crop"] == "squash"
    assert file["made_by"]["source"] == f"{server.url}/{NAME}"
    reference = torch.load(report / "reference.pt")
    assert reference["images"].std() > 0.01
    for path in (report / source, tmp_path / "models" / NAME):
        generator = load_generator(path)
        assert generator.config == Generator(ngf=8, stem_norm=False).config and not generator.training
        assert torch.equal(generator(reference["z"]), reference["images"])
    # --sha256 is about the file that came, also when the one written anew is there
    assert get(server, tmp_path / "models", "--sha256", hashlib.sha256(content).hexdigest()) == 0
    assert get(server, tmp_path / "models", "--sha256", "0" * 64) == 2 and (tmp_path / "models" / NAME).is_file()
    assert "is there, but its sha256 is" in capsys.readouterr().err


def flipped(body):
    middle = len(body) // 2  # inside a tensor: torch.load takes it without a word
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


WRONG = [
    (NAME, lambda body: PAGE, "web page"), (NAME, lambda body: b"", "empty"), (NAME, flipped, "checksums are wrong"),
    (NAME, lambda body: body[:-1], "torn"), (NAME, lambda body: os.urandom(10_000), "torn"),
    ("wide.pt", bytes, "the report's generator"), ("kernel.pt", bytes, "its convT1 is"),
    ("hook.pt", bytes, "nothing in it was run"), ("reference.pt", bytes, "it holds bare weights"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "change", "reason"), WRONG)
def test_wrong_file_is_not_taken(report, server, tmp_path, capsys, source, change, reason):
    server.files[f"/{NAME}"] = body = change((report / source).read_bytes())
    assert get(server, tmp_path) == 2 and os.listdir(tmp_path) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error
    assert f"open {server.url}/{NAME} in a browser" in error and str(tmp_path / NAME) in error
    (tmp_path / NAME).write_bytes(body)
    assert get(server, tmp_path) == 2 and (tmp_path / NAME).read_bytes() == body
    assert "move it away" in capsys.readouterr().err and len(server.seen) <= 2


@pytest.mark.parametrize("way", ["URL", "Drive"])
def test_torn_download_leaves_nothing_and_may_be_repeated(report, server, tmp_path, monkeypatch, capsys, way):
    ids, gdowns = download_model.DRIVE_IDS, gdown.download  # gdown itself, from the server
    monkeypatch.setattr(gdown, "download", lambda id, **rest: gdowns(f"{server.url}/{id}", use_cookies=False, **rest))
    server.files = dict.fromkeys([f"/{NAME}", *(f"/{id}" for id in ids.values())], (report / NAME).read_bytes())
    wanted, address = list(ids), f"https://drive.google.com/file/d/{ids[NAME]}/view"
    flags = ["--out", str(tmp_path)]
    if way == "URL":
        wanted, address, flags = [NAME], f"{server.url}/{NAME}", [*flags, NAME, "--from", server.url]
    server.cut = 2_000_000
    assert download_model.main(flags) == 2 and os.listdir(tmp_path) == []
    assert f"open {address} in a browser" in capsys.readouterr().err.splitlines()[-1]
    server.cut = None
    dead = tmp_path / f".x.tmp-{'0' * 32}.pt"  # what kill -9 leaves, and torch.hub's own beside it
    dead.touch(), (tmp_path / f"{dead.name}.{'0' * 32}.partial").touch()
    assert download_model.main(flags) == 0 and sorted(os.listdir(tmp_path)) == sorted(wanted)
    files = [read_model_file(tmp_path / name) for name in wanted]
    assert files[0]["made_by"]["source"] == address
    assert [file["step"] for file in files] == [12000, 300000, 2166000, 3462000, 3924000][: len(wanted)]


@pytest.mark.parametrize("where", ["beside", "flag"])
def test_shared_file_has_its_sha256_and_stays_as_it_came(server, tmp_path, capsys, where):
    models, generator = tmp_path / "models", Generator(nz=10, ngf=8, size=32)
    file = {"format": 1, "step": 7, "settings": {}, "made_by": {}}
    torch.save(file | {"generator": {"config": generator.config, "state": generator.state_dict()}}, tmp_path / "x")
    server.files["/faces/mine.pt"] = content = (tmp_path / "x").read_bytes()
    flags = ["--from", f"{server.url}/faces/mine.pt", "--out", str(models)]
    server.broken = ("/faces/mine.pt.sha256",)  # a sum that cannot be read is not skipped
    assert download_model.main(flags) == 2 and os.listdir(models) == []
    server.broken = ()
    for right, digest in ((False, "0" * 64), (True, hashlib.sha256(content).hexdigest())):
        server.files["/faces/mine.pt.sha256"] = f"{digest if where == 'beside' else 'nothing'}  mine.pt\n".encode()
        more = ["--sha256", digest.upper()] if where == "flag" else []
        assert download_model.main([*flags, *more]) == (0 if right else 2)
        assert os.listdir(models) == (["mine.pt"] if right else [])
        assert right or f"not {digest}" in capsys.readouterr().err
    assert (models / "mine.pt").read_bytes() == content
    asked = len(server.seen)
    assert download_model.main(flags) == 0 and len(server.seen) == asked  # kept: not a byte is asked for
    assert download_model.main([*flags, "--sha256", "0" * 64]) == 2 and (models / "mine.pt").is_file()


BAD_FLAGS = [
    ("11999", "11999: no published model"), ("--from models", "--from models"), ("--from file:///x", "--from file:"),
    ("--from http://127.0.0.1:9/m.pt 12000", "and no name"), ("--from http://127.0.0.1:9/m.pt", "did not come"),
    ("--sha256 " + "0" * 64, "for one file only"), ("12000 --sha256=", "64 hexadecimal digits"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "reason"), BAD_FLAGS)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, reason):
    assert download_model.main([*flags.split(), "--out", str(tmp_path)]) == 2 and os.listdir(tmp_path) == []
    err = capsys.readouterr().err
    assert reason in err and err.startswith("download_model.py: error: ") and len(err.splitlines()) == 1


def test_list_shows_name_step_size_and_what_is_there(tmp_path, capsys):
    (tmp_path / "generator_model_batch_300000.pt").write_bytes(bytes(2_500_000))
    (tmp_path / "mine.pt").write_bytes(b"")
    assert download_model.main(["--list", "--out", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[:2] == [[NAME, "12000", "81.5", "no"], ["generator_model_batch_300000.pt", "300000", "2.5", "yes"]]
    assert len(rows) == 6 and rows[5] == ["mine.pt", "0.0", "yes"]
