"""A page in the browser to play with: morphs that follow the hand, a guessing game, your own photos, a run's models.

Needs `pip install gradio`. Nothing leaves the machine, and uploaded photos are deleted once their faces are read.
"""

import base64
import html
import io
import os
import random
import re
import sys
import tempfile
import threading
from functools import cache, partial, wraps
from math import comb
from pathlib import Path

import torch
from PIL import Image

import Interpolation
import photos
from checkpoints import load_generator, read_model_file, step_of
from command_line import UserError, make_parser, run_command
from Dataset import open_data
from device import add_device_flag, pick_device
from Generator import latent, to_uint8

try:
    import gradio as gr
except ImportError:  # an optional package; serve() says how to get it
    gr = None

SHEET = 24  # faces shown at once
MOST_STOPS = 24  # faces of a route
ROUNDS = 10  # of the game
FIXED_SEEDS = range(12)  # that the models of a run are compared by
HINT = '<div class="hint">Choose two faces or more: the slider then leads from one to the next.</div>'
HIDDEN = {"show_progress": "hidden"}
CSS = """
.gradio-container {max-width: 1100px !important; margin: auto !important}
.face img, .face video {width: min(100%, 384px); display: block; margin: auto; border-radius: 8px}
.faces {display: flex; flex-wrap: wrap; gap: 8px}
.faces figure {margin: 0; text-align: center; font-size: 12px; line-height: 1.6}
.faces img {width: 56px; display: block; border-radius: 4px} .many img {width: 112px}
.right img {outline: 3px solid #2e9e5b} .wrong img {outline: 3px solid #c8442d}
.hint {text-align: center; opacity: .7; padding: 4em 1em}
#sheet .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)) !important; gap: 4px; padding-top: 24px}
#sheet .grid-wrap {overflow: hidden; max-height: none}
@media (max-width: 640px) {.face img, .face video {width: min(70%, 260px)} .many img {width: 96px}}
"""


def to_tag(pixels, text):
    """Return an <img> that holds an (H, W, 3) uint8 array as JPEG, so that no file is needed, with `text` for readers.

    All faces go through here, the real ones of the game as well: nothing but the face may tell.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=92)
    return f'<img alt="{text}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def to_pixels(x):
    """(3, S, S) in [-1, 1] -> (S, S, 3) uint8 array."""
    return to_uint8(x).permute(1, 2, 0).cpu().numpy()


def row_of(pictures, size=""):
    """Return a row of pictures with texts below as HTML. pictures: ((3, S, S) in [-1, 1], text, class) of each."""
    figures = []
    for x, text, kind in pictures:
        text = html.escape(text)
        figures.append(f'<figure class="{kind}">{to_tag(to_pixels(x), text)}{text}</figure>')
    return f'<div class="faces {size}">{"".join(figures)}</div>'


def on_page(function):
    """Make a UserError of `function` a message on the page, which goes on; other errors keep their traceback."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except UserError as error:
            text = re.sub(r"^--[\w-]+:? ", "", str(error))  # there are no flags on the page
            raise gr.Error(html.escape(text), print_exception=False) from None

    return wrapped


# ---- a route: its face, slider and film -----------------------------------------------------------------------


def face_at(generator, stops, percent, loop):
    """Return the face at `percent` of the route through `stops`, [(name, (nz,) latent), ...], as HTML."""
    if not stops:
        return HINT
    z = torch.stack([z for _, z in stops])  # (n, nz)
    z = Interpolation.path(z, [percent / 100 * (len(z) - 1 + loop)])  # (1, nz)
    return to_tag(next(Interpolation.film(generator, z[:, None])), "the face at the slider")


def write_morph(generator, stops, frames, pace, loop, ending, progress):
    """Write the film of a route into the page's temporary folder; return its path, and itself as HTML."""
    if len(stops) < 2:
        raise UserError("choose two faces or more first")
    Interpolation.pick_seeds([name for name, _ in stops], 1, loop)  # raises where one follows itself
    z, _ = Interpolation.route(generator, [z for _, z in stops], int(frames), pace=pace, loop=loop)
    scale = max(1, 256 // generator.size)
    out = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")), f"morph{ending}")
    pictures = progress.tqdm(Interpolation.film(generator, z[:, None], scale=scale), total=len(z), desc="film")
    sample = Interpolation.film(generator, z[:: len(z) // 32 + 1, None], scale=scale)
    Interpolation.write_film(out, pictures, 25, sample)
    data = base64.b64encode(out.read_bytes()).decode()
    if ending == ".mp4":
        return str(out), f'<video src="data:video/mp4;base64,{data}" autoplay loop muted controls></video>'
    return str(out), f'<img alt="the film" src="data:image/gif;base64,{data}">'


def add_player(generator, stops, tuned):
    """Add a route's face, slider and film to the page; return a function that shows a new route, and its outputs.

    stops: the State with the route. tuned: the State with a generator to use instead of `generator`, or None.
    """
    face = gr.HTML(HINT, elem_classes="face")
    where = gr.Slider(0, 100, 0, step=0.1, label="Along the route, in percent", buttons=[])
    strip = gr.HTML()
    with gr.Accordion("Film"):
        with gr.Row():
            pace = gr.Radio([("even steps", "latent"), ("even to the eye", "perceptual")], value="latent", label="Pace")
            ending = gr.Radio([("GIF", ".gif"), ("MP4", ".mp4")], value=".gif", label="File")
        frames = gr.Slider(2, 100, 25, step=1, label="Frames from face to face", buttons=[])
        loop = gr.Checkbox(label="Back to the first face")
        make = gr.Button("Make the film", variant="primary")
        film = gr.HTML(elem_classes="face")
        download = gr.DownloadButton("Download the film", visible=False)

    def show(tuned, stops):
        model = tuned or generator
        x = Interpolation.faces(model, torch.stack([z for _, z in stops])) if stops else []
        row = row_of([(x, name, "") for x, (name, _) in zip(x, stops, strict=True)])
        percent = 100 if stops else 0  # the face that was added last
        return face_at(model, stops, percent, False), row, percent, False, "", gr.DownloadButton(visible=False)

    @on_page
    def shoot(tuned, stops, frames, pace, loop, ending, progress=gr.Progress()):  # noqa: B008, gradio's way
        out, picture = write_morph(tuned or generator, stops, frames, pace, loop, ending, progress)
        return picture, gr.DownloadButton(value=out, visible=True)

    def look(tuned, *args):
        return face_at(tuned or generator, *args)

    for change in (where.input, loop.input):
        change(look, [tuned, stops, where, loop], face, queue=False, trigger_mode="always_last", **HIDDEN)
    make.click(shoot, [tuned, stops, frames, pace, loop, ending], [film, download], show_progress_on=film)
    return show, [face, strip, where, loop, film, download]


# ---- the tabs -------------------------------------------------------------------------------------------------


def add_morph(generator, known):
    """Add the tab Morph: a sheet of faces, a click on which adds to the route. known: {name: latent} to show first."""

    def sheet(page):
        names = [*known, *range(SHEET * (page + 1))][SHEET * page : SHEET * (page + 1)]
        stops = [(str(name), known[name] if name in known else latent(name, generator.nz)) for name in names]
        x = Interpolation.faces(generator, torch.stack([z for _, z in stops]))
        return stops, [(Image.fromarray(to_pixels(x)), name) for x, (name, _) in zip(x, stops, strict=True)]

    page, stops, tuned = gr.State(0), gr.State([]), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=320):
            look = {"columns": 6, "height": "auto", "object_fit": "cover", "allow_preview": False, "buttons": []}
            gallery = gr.Gallery(sheet(0)[1], label="Faces: click to add", elem_id="sheet", **look)
            more = gr.Button("More faces")
            with gr.Row():
                back, clear = gr.Button("Remove the last"), gr.Button("Start again")
        with gr.Column(min_width=320):
            show, outputs = add_player(generator, stops, tuned)

    @on_page
    def add(page, stops, event: gr.SelectData):
        if len(stops) == MOST_STOPS:
            raise UserError(f"a route has {MOST_STOPS} faces at most")
        stops = [*stops, sheet(page)[0][event.index]]
        return stops, gr.Gallery(selected_index=None), *show(None, stops)

    gallery.select(add, [page, stops], [stops, gallery, *outputs], **HIDDEN)
    more.click(lambda page: (page + 1, sheet(page + 1)[1]), page, [page, gallery])
    back.click(lambda stops: (stops[:-1], *show(None, stops[:-1])), stops, [stops, *outputs], **HIDDEN)
    clear.click(lambda: ([], *show(None, [])), None, [stops, *outputs], **HIDDEN)


def score(game, answers):
    """Return the score of a whole game beside that of chance, and its faces with their answers, as HTML."""
    right = sum(real == answer for (_, real), answer in zip(game, answers, strict=True))
    luck = sum(comb(len(game), k) for k in range(right, len(game) + 1)) / 2 ** len(game)
    faces = []
    for (x, real), answer in zip(game, answers, strict=True):
        faces.append((x, "real" if real else "generated", "right" if real == answer else "wrong"))
    text = (
        f"{right} of {len(game)} right. Tossing a coin gives {len(game) // 2} on average, {right} or more in {luck:.0%}"
    )
    return f"<h3>{text} of games.</h3>{row_of(faces, 'many')}"


def add_game(generator, data, crop):
    """Add the tab Real or generated?; the images are opened, and packed if need be, when the first game begins."""
    if not data:
        gr.Markdown("This game needs real faces: start with `python demo.py --data PATH`, a zip or folder of them.")
        return
    lock, images = threading.Lock(), cache(lambda: open_data(data, generator.size, crop))
    game, answers = gr.State([]), gr.State([])
    head = gr.Markdown(f"{ROUNDS} faces, one after the other. Which of them are real people?")
    face = gr.HTML(elem_classes="face")
    start = gr.Button("New game", variant="primary")
    with gr.Row():
        buttons = [gr.Button(text, visible=False) for text in ("Real", "Generated")]
    outputs = [game, answers, head, face, start, *buttons]

    def turn(game, answers):
        over = len(answers) == len(game)
        head = "Green where you were right, red where not." if over else f"Face {len(answers) + 1} of {len(game)}"
        face = score(game, answers) if over else to_tag(to_pixels(game[len(answers)][0]), "real or generated?")
        return game, answers, head, face, gr.Button(visible=over), *[gr.Button(visible=not over)] * 2

    @on_page
    def begin():
        with lock:
            dataset = images()
        game = []
        for real in random.choices([True, False], k=ROUNDS):
            z = latent(random.randrange(2**32), generator.nz)[None]
            x = dataset.batch([random.randrange(len(dataset))]) if real else Interpolation.faces(generator, z)
            game.append((x[0].cpu(), real))
        return turn(game, [])

    start.click(begin, None, outputs)
    for button, answer in zip(buttons, (True, False), strict=True):
        button.click(lambda game, all, a=answer: turn(game, [*all, a]), [game, answers], outputs, **HIDDEN)


def read_uploads(paths, size):
    """Return [(name, face), ...] of uploaded photos, and a line for each that has none; delete the files."""
    found, refused = [], []
    for path in map(Path, paths):
        try:
            found.append((path.stem, photos.read_face(path, size)))
        except UserError as error:
            refused.append(str(error).removeprefix("--photos ").replace(str(path), path.name))
        finally:
            path.unlink(missing_ok=True)
    return found, refused


def add_photos(generator):
    """Add the tab Your photos: upload, tune, then what Morph has."""
    people, stops, tuned = gr.State([]), gr.State([]), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=320):
            upload = gr.File(label="Two photos or more, a face in each", file_count="multiple", height=160)
            sheet = gr.HTML()
            fit, clear = gr.Button("Morph these people", variant="primary"), gr.Button("Start again")
            result = gr.HTML()
        with gr.Column(min_width=320):
            show, outputs = add_player(generator, stops, tuned)

    def read(paths, people):
        found, refused = read_uploads(paths, generator.size)
        for line in refused:
            gr.Warning(html.escape(line))
        for name, x in found[: MOST_STOPS - len(people)]:
            people = [*people, (f"{len(people) + 1} {name[:12]}", x)]
        return None, people, row_of([(x, name, "") for name, x in people], "many")

    @on_page
    def become(people, progress=gr.Progress()):  # noqa: B008
        if len(people) < 2:
            raise UserError("add two photos with a face or more first")
        names, faces = zip(*people, strict=True)
        model, z, lines = photos.fit(generator, list(faces), progress.tqdm)
        stops = list(zip(names, z, strict=True))
        text = "".join(f"<p>{html.escape(name)}: {line}</p>" for name, line in zip(names, lines, strict=True))
        return model, stops, text, *show(model, stops)

    upload.upload(read, [upload, people], [upload, people, sheet])
    fit.click(become, people, [tuned, stops, result, *outputs], show_progress_on=result)
    clear.click(lambda: ([], "", None, [], "", *show(None, [])), None, [people, sheet, tuned, stops, result, *outputs])


def find_models(model):
    """Return {folder: its model files by step} for the folder of --model and all runs."""
    folders = [Path(model) if Path(model).is_dir() else Path(model).parent, *sorted(Path("runs").glob("*/"))]
    found = {folder: sorted(folder.glob("*.pt"), key=lambda file: (step_of(file), file.name)) for folder in folders}
    return {str(folder): files for folder, files in found.items() if files}


def add_models(model, device):
    """Add the tab Which model?: the faces of FIXED_SEEDS at each checkpoint of a run."""
    runs = find_models(model)
    if not runs:
        gr.Markdown("No models here: train some, or start the page with `--model` and a run's folder.")
        return

    @on_page
    def draw(run, k):
        files = find_models(model)[run]
        file = files[min(int(k), len(files)) - 1]
        generator = load_generator(file, device)
        x = Interpolation.faces(generator, torch.stack([latent(seed, generator.nz) for seed in FIXED_SEEDS]))
        row = row_of([(x, f"seed {seed}", "") for seed, x in zip(FIXED_SEEDS, x, strict=True)], "many")
        return f"<h3>{html.escape(file.name)}</h3>{row}"

    def choose(run):
        count = len(find_models(model)[run])
        return gr.Slider(maximum=max(count, 2), value=count, visible=count > 1), draw(run, count)

    first, files = next(iter(runs.items()))
    run = gr.Dropdown([(Path(run).name or run, run) for run in runs], value=first, label="Run")
    step = gr.Slider(1, max(len(files), 2), len(files), step=1, label="Checkpoint", visible=len(files) > 1, buttons=[])
    faces = gr.HTML(partial(draw, first, len(files)))
    run.input(choose, run, [step, faces])
    step.input(draw, [run, step], faces, trigger_mode="always_last", **HIDDEN)


# ---- the page -------------------------------------------------------------------------------------------------


def build(model, data=None, device="cpu"):
    """Return the page, a gradio Blocks, for the values of --model, --data and --device."""
    generator = Interpolation.load_model(model, device).to(memory_format=torch.channels_last)
    file = read_model_file(model) if Path(model).is_file() else {}
    with gr.Blocks(title="FaceFusion", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# FaceFusion\nFaces of people who do not exist, and the way from one to the next.")
        with gr.Tab("Morph"):
            add_morph(generator, photos.tuned_latents(model) if "photos" in file else {})
        with gr.Tab("Real or generated?"):
            add_game(generator, data, file.get("settings", {}).get("crop", "center"))
        with gr.Tab("Your photos"):
            add_photos(generator)
        with gr.Tab("Which model?"):
            add_models(model, device)
    return page


def serve(argv):
    """Show the page that the command line asks for until Ctrl-C. Raises UserError for bad flags and without gradio."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(Interpolation.SHIPPED), help="a model, a folder of them, or latest")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="zips or folders of real faces, for the game")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    add_device_flag(parser)
    args = parser.parse_args(argv)
    if gr is None:
        raise UserError("the page needs gradio: pip install gradio")
    missing = [path for path in args.data or [] if path != "drawn" and not (path and Path(path).exists())]
    if missing:
        raise UserError(f"--data {missing[0]}: no such file or folder")
    with tempfile.TemporaryDirectory(prefix="facefusion-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        page = build(args.model, args.data, pick_device(args.device))
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others come from a CDN
        look = {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False, "max_file_size": "50mb"}
        try:
            page.launch(server_name=args.host, server_port=args.port, share=False, prevent_thread_lock=True, **look)
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {args.host} --port {args.port}: cannot listen there; choose another") from error
        threading.Event().wait()


def main(argv=None):
    return run_command(serve, argv)


if __name__ == "__main__":
    sys.exit(main())
