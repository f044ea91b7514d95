import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs gradio")
import demo  # noqa: E402
import photos  # noqa: E402
from Generator import Generator, latent  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def threads():
    """The page takes as many threads as cores are free; other tests' bits are those of the threads they began with."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder with two checkpoints of a small model."""
    folder = tmp_path_factory.mktemp("runs") / "0001-tiny"
    folder.mkdir()
    for step in (9, 10):
        torch.manual_seed(step)
        generator = Generator(nz=16, ngf=8, size=32)
        file = {"config": generator.config, "state": generator.state_dict()}
        file = {"format": 1, "step": step, "settings": None, "generator": file, "made_by": {}}
        for kind in ("checkpoint", "generator"):  # the page takes them for one
            torch.save(file, folder / f"{kind}_{step:06d}.pt")
    return folder


@pytest.fixture
def page(run_folder, tmp_path, monkeypatch):
    """The page's functions by their names; those of Morph, where Your photos has the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    blocks = demo.build(str(run_folder), ["drawn"])
    functions = {}
    for event in blocks.fns.values():
        functions.setdefault(event.fn.__name__, event.fn)
    return functions


@pytest.fixture
def faces(tmp_path):
    """The paths of two generated faces as photos."""
    pytest.importorskip("facenet_pytorch", reason="needs facenet-pytorch")
    _, _, generator = demo.Interpolation.open_model(ROOT / "bests" / "generator_128.pt")
    paths = [tmp_path / name for name in ("anna.jpg", "bert.jpg")]
    for path, x in zip(paths, generator(torch.stack([latent(9), latent(48)])), strict=True):
        demo.to_image(x).resize((300, 300)).save(path)
    return paths


class Progress:
    def tqdm(self, iterable, **_):
        return iterable


def stops(*seeds):
    return [(str(seed), latent(seed, 16)) for seed in seeds]


def test_a_click_adds_a_face_and_the_slider_moves_it(page):
    event = gr.SelectData(None, {"index": 3, "value": None})
    _, route, face, strip, percent, *_ = page["add"](0, stops(5), event)
    assert [name for name, _ in route] == ["5", "3"] and strip.count("<img") == 2
    # The slider's ends are the faces themselves, and with the way back its other end is the first face.
    look = page["look"]
    assert percent == 100 and face == look(route, None, 100, False) == look(stops(3), None, 0, False)
    assert look(route, None, 0, False) == look(route, None, 100, True) != look(route, None, 50, False)
    assert "<img" not in look([], None, 0, False)


@pytest.mark.parametrize("ending, loop, frames", [(".gif", False, 9), (".mp4", True, 12)])
def test_the_button_makes_a_film_of_the_route(page, ending, loop, frames):
    picture, download = page["shoot"](stops(1, 2, 3), None, 4, "perceptual", loop, ending, progress=Progress())
    file = next(Path(os.environ["GRADIO_TEMP_DIR"]).glob(f"*/morph{ending}"))
    assert download.visible and f"/{ending[1:]};base64," in picture and file.stat().st_size
    if ending == ".gif":
        with Image.open(file) as film:
            assert film.size == (256, 256) and film.n_frames == frames


@pytest.mark.parametrize("seeds, words", [([1], "two faces"), ([1, 1], "1 follows itself")])
def test_a_route_without_a_way_is_a_message(page, seeds, words):
    with pytest.raises(gr.Error, match=words) as error:
        page["shoot"](stops(*seeds), None, 4, "latent", False, ".gif", progress=Progress())
    assert "--" not in error.value.message


def test_a_game_has_ten_faces_that_differ_in_nothing_but_the_face(page):
    game, answers, head, face, *_ = page["begin"]()
    assert len(game) == 10 and answers == [] and head == "Face 1 of 10" and "image/jpeg" in face
    assert {x.shape for x, _ in game} == {(3, 32, 32)} and {x.dtype for x, _ in game} == {torch.float32}
    truth = [real for _, real in game]
    assert demo.score(game, truth).startswith("<h3>10 of 10 right. Tossing a coin gives 5 on average, 10 or more in 0%")
    wrong = demo.score(game, [not real for real in truth])
    assert "0 of 10" in wrong and "in 100%" in wrong and wrong.count('class="wrong"') == 10


def test_the_page_is_that_of_the_newest_model_and_of_its_crop_and_photos(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latest").write_text("stray")
    seen = {name: [] for name in ("add_morph", "add_game", "add_photos", "add_models")}
    for name, calls in seen.items():
        monkeypatch.setattr(demo, name, lambda *args, calls=calls: calls.append(args))
    for name, crop in (("0009-old", "center"), ("0010-new", "squash")):
        shutil.copytree(run_folder, Path("runs", name))
        file = torch.load(run_folder / "generator_000010.pt", weights_only=True) | {"settings": {"crop": crop}}
        torch.save(
            file | {"photos": {"names": [name], "latents": torch.ones(1, 16)}}, f"runs/{name}/generator_000010.pt"
        )
    demo.build("latest", ["drawn"])
    demo.build(Path("runs/0009-old"), ["drawn"])
    demo.build(run_folder / "generator_000009.pt", ["drawn"])
    assert [[*known] for _, known in seen["add_morph"]] == [["0010-new"], ["0009-old"], []]
    assert [args[2] for args in seen["add_game"]] == ["squash", "center", "center"]
    assert [args[1] for args in seen["add_photos"]] == ["squash", "center", "center"]
    assert [args[1] for args in seen["add_models"]] == [Path("runs/0010-new"), Path("runs/0009-old"), run_folder]


def test_uploads_become_faces_or_messages_and_are_deleted(page, faces, tmp_path, monkeypatch):
    faces[0].rename(tmp_path / "<b>anna.jpg")
    Image.new("RGB", (300, 300)).save(tmp_path / "blank.png")
    (tmp_path / "rubbish.txt").write_text("rubbish")
    files = [str(tmp_path / name) for name in ("<b>anna.jpg", "blank.png", "rubbish.txt")]
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    _, people, row = page["read"](files, [])
    assert len(people) == 1 and people[0][1].shape == (3, 32, 32) and "<b>" not in row
    assert warnings[0].startswith("blank.png: no face found") and warnings[1].startswith("rubbish.txt: cannot be read")
    assert not any(map(os.path.exists, files))
    with pytest.raises(gr.Error, match="add two photos"):
        page["become"](people, progress=Progress())


def test_two_people_become_a_route_of_a_tuned_model(page, monkeypatch):
    for name, value in {"SEARCH": 8, "STARTS": 1, "INVERT_STEPS": 2, "TUNE_STEPS": 2}.items():
        monkeypatch.setattr(photos, name, value)
    monkeypatch.setattr(photos, "bar", None)  # the page's own bar is used
    people = [("anna", torch.zeros(3, 32, 32)), ("bert", torch.ones(3, 32, 32))]
    text, tuned, route, face, *_ = page["become"](people, progress=Progress())
    assert [name for name, _ in route] == ["anna", "bert"] and "anna: error" in text and "SSIM" in text
    assert face == page["look"](route, tuned, 100, False) != page["look"](route, None, 100, False)


def test_the_models_of_a_run_are_shown_in_the_order_of_their_steps(page, run_folder):
    step, faces = page["choose"](str(run_folder))
    assert step.value == 2 and "checkpoint_000010.pt" in faces and faces.count("<img") == 12
    assert "checkpoint_000009.pt" in page["draw"](str(run_folder), 1)
    (run_folder / "checkpoint_000011.pt").write_bytes(b"torn")
    blocks = demo.build(str(run_folder))
    draw = next(event.fn for event in blocks.fns.values() if event.fn.__name__ == "draw")
    (run_folder / "checkpoint_000011.pt").unlink()
    with pytest.raises(gr.Error):
        draw(str(run_folder), 3)


@pytest.mark.parametrize(
    "flags, words", [(["--data", "gone.zip"], "gone.zip: no such"), (["--model", "gone.pt"], "--model gone.pt")]
)
def test_bad_flags_are_one_line(capsys, flags, words):
    assert demo.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_without_gradio_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(demo, "gr", None)
    assert demo.main([]) == 2 and "pip install gradio" in capsys.readouterr().err


# ---- as a user, in a real browser ----


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1400"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def address(run_folder, tmp_path):
    """The address of a page that runs in a process of its own; when it is told to end, it leaves no file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "t").mkdir()
    command = [sys.executable, ROOT / "demo.py", "--model", run_folder, "--data", "drawn", "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path / "t")})
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            time.sleep(0.5)
    yield address
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert not list((tmp_path / "t").glob("facefusion-*"))


def test_the_page_in_a_browser(browser, address, tmp_path, faces):
    def shown(css):
        return [element for element in browser.find_elements("css selector", css) if element.is_displayed()]

    def wait(condition, seconds=90):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the page did not answer"
            time.sleep(0.1)

    def click(text):
        path = f"//*[self::a or self::button or self::label][normalize-space()='{text}']"
        wait(lambda: any(element.is_displayed() for element in browser.find_elements("xpath", path)))
        next(element for element in browser.find_elements("xpath", path) if element.is_displayed()).click()

    def upload(*paths):
        wait(lambda: browser.find_elements("css selector", "input[type=file]"))
        browser.find_elements("css selector", "input[type=file]")[-1].send_keys("\n".join(map(str, paths)))

    browser.get(address)
    for count, k in enumerate((3, 9, 14), 1):
        wait(lambda: len(browser.find_elements("css selector", "#sheet button img")) == demo.SHEET)
        browser.find_elements("css selector", "#sheet button img")[k].click()
        wait(lambda count=count: len(shown(".faces figure")) == count)
    before = shown(".face img")[0].get_attribute("src")
    slide = "arguments[0].value = 30; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    browser.execute_script(slide, shown("input[type=range]")[0])
    wait(lambda: shown(".face img")[0].get_attribute("src") != before)
    for ending, film in ((".gif", ".face img:not([alt])"), (".mp4", ".face video")):
        click(ending[1:].upper())
        click("Make the film")
        wait(lambda film=film: shown(film))
        click("Download the film")
        wait(lambda ending=ending: list((tmp_path / "downloads").glob(f"*{ending}")))
    with Image.open(next((tmp_path / "downloads").glob("*.gif"))) as film:
        assert film.n_frames == 51
    click("Real or generated?")
    click("New game")
    for k in range(10):
        wait(lambda k=k: f"Face {k + 1} of 10" in browser.page_source)
        click("Real")
    wait(lambda: "of 10 right" in browser.page_source)
    click("Your photos")
    (tmp_path / "rubbish.txt").write_text("rubbish")
    upload(tmp_path / "rubbish.txt")
    wait(lambda: "rubbish.txt: cannot be read" in browser.page_source)
    upload(*faces)
    wait(lambda: len(shown(".faces figure")) == 2)
    click("Morph these people")
    wait(lambda: "SSIM" in browser.page_source and len(shown(".faces figure")) == 4)
    click("Make the film")
    wait(lambda: shown(".face img:not([alt])"))
    click("Which model?")
    wait(lambda: any("checkpoint_000010.pt" in element.text for element in shown("h3")))
    asked = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert asked and all('"url":"http' not in message or f'"url":"{address}' in message for message in asked)
