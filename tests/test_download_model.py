"""download_model.py against a local server that misbehaves, and Generator.load on files like those of the report."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

import download_model
from checkpoints import load_generator, read_model_file
from Generator import Generator

NAME = "generator_model_batch_12000.pt"
QUOTA_PAGE = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"

# Plays the report's training script: a class Generator in a module Generator, pickled whole.
WRITER = """
import sys, types
from collections import OrderedDict
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self, nz=100, ngf=8, kernel=4, relu=False):
        super().__init__()
        self.linear = nn.Linear(nz, 4 * 4 * 512)
        widths = [512, ngf * 8, ngf * 4, ngf * 2, ngf, ngf // 2]
        for i in range(1, 6):
            setattr(self, f"convT{i}", nn.ConvTranspose2d(*widths[i - 1:i + 1], kernel, 2, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.conv = nn.Conv2d(ngf // 2, 3, 3, 1, 1)
        if relu:
            self.relu = nn.ReLU()

    def forward(self, z):
        x = self.linear(z).reshape(-1, 512, 4, 4)
        for i in range(1, 6):
            x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"convT{i}")(x)))
        return torch.tanh(self.conv(x))

class Hook:
    def __reduce__(self):
        return open, ("hook_ran", "w")

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

torch.save(Generator(kernel=6), "kernel.pt")
torch.save(Generator(relu=True), "relu.pt")
torch.save(nn.Linear(100, 8192), "linear.pt")
torch.save(Generator(ngf=16), "wide.pt")
wrong = Generator()
del wrong.bn3
torch.save(wrong, "missing.pt")
wrong = Generator()
wrong.extra = nn.Linear(1, 1)
torch.save(wrong, "extra.pt")
wrong = Generator()
wrong.bn2.eps = 0.1
torch.save(wrong, "eps.pt")
wrong = Generator()
wrong.conv.weight = nn.Parameter(torch.zeros(3, 4, 5, 5))  # and kernel_size still says 3
torch.save(wrong, "shape.pt")

wrong = Generator()
wrong._forward_hooks[0] = Hook()
torch.save(wrong, "hook.pt")
torch.load("hook.pt", weights_only=False)  # leaves hook_ran, so the file is as bad as it should be

# What torch 2.0 put into a module's pickle: OrderedDicts, and none of the attributes that came later.
IN_2_0 = "training _parameters _buffers _non_persistent_buffers_set _backward_pre_hooks _backward_hooks " \\
    "_is_full_backward_hook _forward_hooks _forward_hooks_with_kwargs _forward_pre_hooks " \\
    "_forward_pre_hooks_with_kwargs _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks " \\
    "_load_state_dict_post_hooks _modules".split()
for module in model.modules():
    for key, value in list(vars(module).items()):
        if key.startswith("_") and key not in IN_2_0 and key != "_reversed_padding_repeated_twice":
            del vars(module)[key]
        elif type(value) is dict:
            vars(module)[key] = OrderedDict(value)
torch.save(model, "old_torch.pt")
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder of files as the report's code would have written them, with ngf 8 instead of 128."""
    folder = tmp_path_factory.mktemp("report")
    subprocess.run([sys.executable, "-c", WRITER], cwd=folder, check=True)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Let the published generator have the ngf of the files in `report`."""
    config = download_model.PUBLISHED_CONFIG | {"ngf": 8}
    monkeypatch.setattr(download_model, "PUBLISHED_CONFIG", config)
    monkeypatch.setattr(
        download_model, "PUBLISHED_PARAMETERS", sum(p.numel() for p in Generator(**config).parameters())
    )


@pytest.fixture
def server():
    """A server of `files` ({path: bytes}); it honours Range if `ranges`, and hangs up after `cut` bytes."""
    state = SimpleNamespace(files={}, ranges=True, cut=None, type="application/octet-stream", broken=(), seen=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.seen.append((self.path, self.headers.get("Range")))
            if self.path in state.broken:
                return self.send_error(503)
            if self.path not in state.files:
                return self.send_error(404)
            body, start = state.files[self.path], 0
            if state.ranges and "Range" in self.headers:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Type", state.type)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : state.cut])

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    yield state
    httpd.shutdown()
    httpd.server_close()


def get(server, folder, *more):
    return download_model.main(["12000", "--from", server.url, "--out", str(folder), *more])


# The report's files


def test_published_figures():
    with torch.device("meta"):
        generator = Generator(**download_model.PUBLISHED_CONFIG)
    assert sum(p.numel() for p in generator.parameters()) == download_model.PUBLISHED_PARAMETERS == 20_362_819


@pytest.mark.parametrize("name", [NAME, "old_torch.pt"])
def test_report_file_gives_the_same_picture_bit_for_bit(report, name):
    reference = torch.load(report / "reference.pt")
    assert reference["images"].std() > 0.01
    generator = load_generator(report / name)
    assert generator.config == download_model.PUBLISHED_CONFIG | {"ngf": 8}
    assert not generator.training
    assert torch.equal(generator(reference["z"]), reference["images"])


def test_report_file_reads_as_a_model_file_of_this_project(report, tmp_path):
    file = read_model_file(report / NAME)
    assert file["step"] == 12000
    assert file["settings"]["crop"] == "squash"
    torch.save(file, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)  # plain types: no class needs to be allowed
    z = torch.load(report / "reference.pt")["z"]
    assert again.keys() == file.keys()
    assert torch.equal(load_generator(tmp_path / "again.pt")(z), load_generator(report / NAME)(z))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("kernel.pt", r"its convT1 is .*kernel_size=\(6, 6\)"),
        ("eps.pt", "its bn2 is .*eps=0.1"),
        ("missing.pt", "its layers are linear"),
        ("extra.pt", "its layers are .*extra"),
        ("linear.pt", "its layers are none"),
        ("shape.pt", "size mismatch for to_rgb.128.weight"),
        ("relu.pt", "names torch.nn.modules.activation.ReLU; nothing in it was run"),
    ],
)
def test_another_module_is_refused(report, name, reason):
    with pytest.raises(ValueError, match=reason) as error:
        load_generator(report / name)
    assert "\n" not in str(error.value)


def test_nothing_in_a_pickle_runs(report, tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": 1, "generator": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="mkdir; nothing in it was run"):
        load_generator(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it was a real one

    (report / "hook_ran").unlink()
    monkeypatch.chdir(report)
    with pytest.raises(ValueError, match="open; nothing in it was run"):
        load_generator("hook.pt")
    assert not (report / "hook_ran").exists()


# Downloads


def test_whole_file_is_converted(report, server, small, tmp_path, capsys):
    server.files[f"/{NAME}"] = (report / NAME).read_bytes()
    assert get(server, tmp_path / "models") == 0
    assert os.listdir(tmp_path / "models") == [NAME]
    file = torch.load(tmp_path / "models" / NAME, weights_only=True)
    assert file["format"] == 1 and file["step"] == 12000 and file["made_by"]["source"] == f"{server.url}/{NAME}"
    z = torch.load(report / "reference.pt")["z"]
    expected = torch.load(report / "reference.pt")["images"]
    assert torch.equal(load_generator(tmp_path / "models" / NAME)(z), expected)
    assert "step 12000" in capsys.readouterr().out


@pytest.mark.parametrize("ranges", [True, False])
def test_partial_download_goes_on(report, server, small, tmp_path, capsys, ranges):
    body = (report / NAME).read_bytes()
    server.files[f"/{NAME}"], server.ranges, server.cut = body, ranges, 1_000_000
    assert get(server, tmp_path) == 2
    assert os.listdir(tmp_path) == [f"{NAME}.part"]
    assert (tmp_path / f"{NAME}.part").read_bytes() == body[:1_000_000]
    assert "broke off after 1,000,000 bytes" in capsys.readouterr().err
    download_model.main(["--list", "--out", str(tmp_path)])
    assert "1.0 MB of it" in capsys.readouterr().out

    server.cut = None
    assert get(server, tmp_path) == 0
    assert (f"/{NAME}", "bytes=1000000-") in server.seen
    assert os.listdir(tmp_path) == [NAME]
    assert download_model.check(tmp_path / NAME, NAME)["step"] == 12000


def test_complete_part_needs_no_byte_more(report, server, small, tmp_path):
    server.files[f"/{NAME}"] = (report / NAME).read_bytes()
    (tmp_path / f"{NAME}.part").write_bytes(server.files[f"/{NAME}"])
    assert get(server, tmp_path) == 0  # the server answers 416
    assert os.listdir(tmp_path) == [NAME]


def test_part_of_another_file_is_refused(report, server, small, tmp_path):
    server.files[f"/{NAME}"] = (report / NAME).read_bytes()
    (tmp_path / f"{NAME}.part").write_bytes((report / "wide.pt").read_bytes()[:2_000_000])
    assert get(server, tmp_path) == 2
    assert os.listdir(tmp_path) == []
    assert get(server, tmp_path) == 0


def test_quota_page_leaves_the_part_alone(server, tmp_path, capsys):
    server.files[f"/{NAME}"], server.type, server.ranges = QUOTA_PAGE, "text/html; charset=utf-8", False
    (tmp_path / f"{NAME}.part").write_bytes(b"PK first half")
    assert get(server, tmp_path) == 2
    error = capsys.readouterr().err
    assert "web page" in error and f"{server.url}/{NAME} in a browser" in error and str(tmp_path / NAME) in error
    assert os.listdir(tmp_path) == [f"{NAME}.part"]
    assert (tmp_path / f"{NAME}.part").read_bytes() == b"PK first half"


def flipped(body):
    middle = len(body) // 2  # inside a tensor: torch.load takes it without a word
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


@pytest.mark.parametrize(
    "source, change, reason",
    [
        (NAME, lambda body: QUOTA_PAGE, "web page"),
        (NAME, lambda body: b"\n " + QUOTA_PAGE, "web page"),
        (NAME, lambda body: b"", "torn or damaged"),
        (NAME, lambda body: body[:-1], "torn or damaged"),
        (NAME, lambda body: body[:70_000], "torn or damaged"),
        (NAME, flipped, "torn or damaged"),
        (NAME, lambda body: os.urandom(10_000), "torn or damaged"),
        ("wide.pt", bytes, "parameters and"),
        ("kernel.pt", bytes, "its convT1 is"),
        ("hook.pt", bytes, "nothing in it was run"),
        ("reference.pt", bytes, "no generator"),
    ],
)
def test_wrong_file_gets_no_name(report, server, small, tmp_path, capsys, source, change, reason):
    server.files[f"/{NAME}"] = change((report / source).read_bytes())
    assert get(server, tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert reason in error and "You may open" in error
    assert os.listdir(tmp_path) == []


def test_flipped_bit_is_caught_by_check_alone(report, tmp_path):
    (tmp_path / "m.pt").write_bytes(flipped((report / NAME).read_bytes()))
    load_generator(tmp_path / "m.pt")  # torch sees nothing
    with pytest.raises(ValueError, match="damaged"):
        download_model.check(tmp_path / "m.pt", "m.pt")


def test_published_name_takes_the_published_size_only(report, server, tmp_path, capsys):
    server.files[f"/{NAME}"] = (report / NAME).read_bytes()  # ngf 8, and nothing patched here
    assert get(server, tmp_path) == 2
    assert "the report's generator 20,362,819" in capsys.readouterr().err


@pytest.fixture
def shared(server, tmp_path):
    """A model that someone shares as /faces/mine.pt, in this project's format; returns its bytes."""
    generator = Generator(nz=10, ngf=8, size=32)
    file = {"format": 1, "step": 7, "settings": {}, "made_by": {}}
    file["generator"] = {"config": generator.config, "state": generator.state_dict()}
    torch.save(file, tmp_path / "shared.bin")
    server.files["/faces/mine.pt"] = (tmp_path / "shared.bin").read_bytes()
    return server.files["/faces/mine.pt"]


def test_shared_file_stays_as_it_came(server, shared, tmp_path):
    args = ["--from", f"{server.url}/faces/mine.pt", "--out", str(tmp_path / "models")]
    assert download_model.main(args) == 0
    assert (tmp_path / "models" / "mine.pt").read_bytes() == shared

    requests = len(server.seen)
    assert download_model.main(args) == 0  # kept: not a byte is asked for
    assert len(server.seen) == requests


@pytest.mark.parametrize("where", ["beside", "flag"])
@pytest.mark.parametrize("right", [True, False])
def test_sha256(server, shared, tmp_path, capsys, where, right):
    digest = hashlib.sha256(shared if right else b"another file").hexdigest()
    args = ["--from", f"{server.url}/faces/mine.pt", "--out", str(tmp_path / "models")]
    if where == "beside":
        server.files["/faces/mine.pt.sha256"] = f"{digest}  mine.pt\n".encode()
    else:
        args += ["--sha256", digest.upper()]
    assert download_model.main(args) == (0 if right else 2)
    assert os.listdir(tmp_path / "models") == (["mine.pt"] if right else [])
    assert right or f"not {digest}" in capsys.readouterr().err.lower()
    if right:  # what is there is held to the flag as well
        assert download_model.main([*args, "--sha256", digest]) == 0
        assert download_model.main([*args, "--sha256", "0" * 64]) == 2
        assert (tmp_path / "models/mine.pt").is_file()


def test_sha256_that_cannot_be_read_is_not_skipped(server, shared, tmp_path):
    server.broken = ("/faces/mine.pt.sha256",)
    args = ["--from", f"{server.url}/faces/mine.pt", "--out", str(tmp_path / "models")]
    assert download_model.main(args) == 2
    assert os.listdir(tmp_path / "models") == ["mine.pt.part"]
    server.broken = ()
    assert download_model.main(args) == 0


def test_sha256_of_a_published_file_is_that_of_what_came(server, report, small, tmp_path, capsys):
    server.files[f"/{NAME}"] = content = (report / NAME).read_bytes()
    for sha256, status in ((hashlib.sha256(content).hexdigest(), 0),) * 2 + (("0" * 64, 2),):
        assert get(server, tmp_path, "--sha256", sha256) == status
    assert "is there, but its sha256 is" in capsys.readouterr().err and (tmp_path / NAME).is_file()


def test_damaged_file_that_is_there_is_not_touched(server, tmp_path, capsys):
    (tmp_path / NAME).write_bytes(QUOTA_PAGE)
    assert get(server, tmp_path) == 2
    assert "move it away" in capsys.readouterr().err
    assert (tmp_path / NAME).read_bytes() == QUOTA_PAGE and server.seen == []


# The Drive, through the same code


def test_drive_files_go_the_same_way(report, small, tmp_path, monkeypatch, capsys):
    body = {"bytes": QUOTA_PAGE}
    asked = []

    def fetch(drive_id, part):
        asked.append(drive_id)
        part.write_bytes(body["bytes"])

    monkeypatch.setattr(download_model, "fetch_from_drive", fetch)
    assert download_model.main(["--out", str(tmp_path)]) == 2
    assert f"https://drive.google.com/file/d/{asked[0]}/view in a browser" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [] and len(asked) == 1

    body["bytes"] = (report / NAME).read_bytes()
    assert download_model.main(["--out", str(tmp_path)]) == 0
    assert sorted(os.listdir(tmp_path)) == sorted(download_model.DRIVE_IDS)
    assert asked[1:] == list(download_model.DRIVE_IDS.values())
    assert [read_model_file(tmp_path / n)["step"] for n in download_model.DRIVE_IDS] == [
        12000, 300000, 2166000, 3462000, 3924000
    ]  # fmt: skip


def test_gdown_goes_on_where_it_stopped(report, server, small, tmp_path, monkeypatch, capsys):
    """gdown itself, with the local server in the Drive's place."""
    import gdown

    real = gdown.download
    monkeypatch.setattr(gdown, "download", lambda id, **more: real(url=f"{server.url}/{id}", use_cookies=False, **more))
    server.files[f"/{download_model.DRIVE_IDS[NAME]}"], server.cut = (report / NAME).read_bytes(), 2_000_000
    assert download_model.main([NAME, "--out", str(tmp_path)]) == 2
    assert "Google Drive did not hand it over" in capsys.readouterr().err.splitlines()[-1]
    (size,) = [p.stat().st_size for p in tmp_path.iterdir()]
    assert 1_000_000 < size <= 2_000_000  # gdown keeps whole chunks

    server.cut = None
    (tmp_path / f"{NAME}.part").write_bytes(b"half of a mirror's file")  # gdown must not take it for its own
    assert download_model.main([NAME, "--out", str(tmp_path)]) == 0
    assert any(wanted == f"bytes={size}-" for _, wanted in server.seen)
    assert sorted(os.listdir(tmp_path)) == [NAME, f"{NAME}.part"]
    assert download_model.check(tmp_path / NAME, NAME)["step"] == 12000


def test_ctrl_c_keeps_what_has_come(tmp_path, monkeypatch, capsys):
    def fetch(drive_id, part):
        part.write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(download_model, "fetch_from_drive", fetch)
    assert download_model.main(["--out", str(tmp_path)]) == 130
    assert "run this again" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [f"{NAME}.drive"]


# Flags


@pytest.mark.parametrize(
    "args, reason",
    [
        (["11999"], "11999: no published model"),
        (["--from", "models"], "--from models: not a URL"),
        (["--from", "file:///etc/passwd"], "not a URL"),
        (["--from", "http://127.0.0.1:9/m.pt", "12000"], "leave out 12000"),
        (["--from", "http://127.0.0.1:9/m.pt"], "cannot be reached"),
        (["--from", "http://127.0.0.1:9/a b.pt"], "cannot be reached"),
        (["--sha256", "0" * 64], "for one file only"),
        (["12000", "--sha256", "abc"], "64 hexadecimal digits"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, args, reason):
    assert download_model.main([*args, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert reason in err and err.startswith("download_model.py: error: ") and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_list_shows_name_step_size_and_what_is_there(tmp_path, capsys):
    (tmp_path / "generator_model_batch_300000.pt").write_bytes(bytes(2_500_000))
    assert download_model.main(["--list", "--out", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0] == [NAME, "12000", "81.5", "no"]
    assert rows[1] == ["generator_model_batch_300000.pt", "300000", "2.5", "yes"]
    assert len(rows) == 5
