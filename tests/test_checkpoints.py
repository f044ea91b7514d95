import pickle
import zipfile

import pytest
import torch
from torch import nn

from checkpoints import FORMAT, load_generator, read_model_file
from command_line import UserError
from Generator import Generator
from run_folder import list_checkpoints


def content(generator, /, **more):
    network = {"config": generator.config, "state": generator.state_dict()}
    return {"format": FORMAT, "step": 3, "generator": network} | more


@pytest.mark.parametrize("kind", ["raw", "average", "in DataParallel"])
def test_load_rebuilds_the_generator_from_its_file_with_the_average_where_there_is_one(tmp_path, kind):
    generator, average = (Generator(nz=7, ngf=8, size=32, stem_norm=False) for _ in range(2))
    file = content(generator, ema=average.state_dict() if kind == "average" else None)
    if kind == "in DataParallel":
        file["generator"]["state"] = nn.DataParallel(generator).state_dict()
    torch.save(file, tmp_path / "model.pt")
    loaded, z = load_generator(tmp_path / "model.pt"), torch.randn(2, 7)
    assert loaded.config == generator.config and not loaded.training
    assert torch.equal(loaded(z), (average if kind == "average" else generator).eval()(z))


class Huge:
    """Pickles as the call nn.Linear(200_000, 200_000), 160 GB."""

    def __reduce__(self):
        return nn.Linear, (200_000, 200_000)


def turned_over(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_files_that_are_no_models_are_refused_in_one_line(tmp_path):
    generator = Generator(nz=7, ngf=8, size=32)
    torch.save(content(generator), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    weights = data.index(generator.linear.weight.detach().numpy().tobytes())
    misfit, bare, huge = content(generator), generator.state_dict(), content(generator)
    misfit["generator"]["config"] = generator.config | {"ngf": 16}
    huge["generator"]["config"] = generator.config | {"nz": 10**12}
    network = content(generator)["generator"]
    nan = network["state"] | {"linear.bias": torch.full((8192,), float("nan"))}
    meta = torch.zeros(8192, device="meta")
    folder = data.rindex(b"PK\x01\x02") + 38  # where a zip says of its last member that it is a folder
    files = {
        "text": (b"hello", "something else"), "empty": (b"", "empty"), "page": (b" <!DOCTYPE html><html>", "web page"),
        "torn": (data[: len(data) // 2], "torn"), "flipped": (turned_over(data, weights + 999), "checksums"),
        "folder": (data[:folder] + b"\x10" + data[folder + 1 :], "checksums"),
        "foreign": ({"weights": 1}, "no generator"), "bare": (bare, "bare weights"), "list": ([1], "no generator"),
        "future": (content(generator, format=99), "format 99"), "misfit": (misfit, "up.8"),
        "huge": (huge, "settings make"),
        "linear": (content(generator, step=Huge()), "step"), "layer": (Huge(), "report's generator"),
        "step": (content(generator, step="3"), "step"), "settings": (content(generator, settings=[1]), "settings"),
        "state": (content(generator, generator=network | {"state": [1]}), "generator"),
        "number": (content(generator, ema=network["state"] | {"linear.bias": 0}), "ema"),
        "key": (content(generator, ema={0: torch.zeros(1)}), "ema"),
        "config": (content(generator, generator=network | {"config": {1: 2}}), "cannot be built"),
        "missing": (content(generator, generator={"config": generator.config}), "generator"),
        "blocks": (content(generator, generator=network | {"config": {"blocks": "x"}}), "cannot be built"),
        "meta": (content(generator, generator=network | {"state": network["state"] | {"linear.bias": meta}}), "plain"),
        "nan": (content(generator, generator=network | {"state": nan}), "finite"),
    }  # fmt: skip
    with pytest.raises(UserError, match="nothing.pt"):
        read_model_file(tmp_path / "nothing.pt")
    for name, (file, words) in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(file) if isinstance(file, bytes) else torch.save(file, path)
        with pytest.raises(UserError, match=rf"{name}\.pt.*{words}") as caught:
            load_generator(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, name


def test_code_in_a_file_is_not_run_and_a_file_cannot_unpack_into_more_than_it_is(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "owned").touch, ()

    torch.save(content(Generator(nz=7, ngf=8, size=32), made_by={"command": Evil()}), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt"):
        read_model_file(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps(1))
        archive.writestr("bomb/data/0", bytes(10**7))
    with pytest.raises(UserError, match="bomb.pt"):
        read_model_file(tmp_path / "bomb.pt")


def test_a_copy_under_a_name_of_ones_own_is_no_checkpoint_of_the_run(tmp_path):
    for name in ("checkpoint_000006.pt", "checkpoint_000006-good.pt", "checkpoint_000008.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint_000008.pt", "checkpoint_000006.pt"]
