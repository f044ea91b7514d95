"""A page in the browser to play with: morphs that follow the hand, a guessing game, your own photos, a run's models.

Needs `pip install gradio`. Nothing leaves the machine, and uploaded photos are deleted once their faces are read.
"""

import base64
import html
import io
import os
import random
import re
import signal
import sys
import tempfile
from contextlib import contextmanager
from functools import cache, partial
from itertools import zip_longest
from math import comb
from pathlib import Path

import torch
from PIL import Image

import Interpolation
import photos
from checkpoints import list_models, load_generator
from command_line import Parser, UserError, filled_path, run_command
from Dataset import choose_paths, open_data
from device import pick_device
from Generator import latent, to_uint8
from settings import add_flags

try:
    import gradio as gr
except ImportError:  # an optional package; serve() says how to get it
    gr = None

SHEET = 24  # faces shown at once
ROUNDS = 10  # of the game
HINT = '<div class="hint">Choose two faces or more: the slider then leads from one to the next.</div>'
HIDDEN = {"show_progress": "hidden"}


def to_image(x):
    """(3, S, S) in [-1, 1] -> a Pillow image."""
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())


def to_tag(x, text):
    """Return an <img> that holds a (3, S, S) picture as JPEG; real and generated faces alike, so that none tells."""
    to_image(x).save(file := io.BytesIO(), "jpeg", quality=92)
    return f'<img alt="{text}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def row_of(pictures, texts, kinds=(), size=""):
    """Return (3, S, S) pictures in a row as HTML, each with a text below and, if `kinds` are given, a CSS class."""
    trios = zip_longest(pictures, map(html.escape, texts), kinds, fillvalue="")
    figures = (f'<figure class="{kind}">{to_tag(x, text)}{text}</figure>' for x, text, kind in trios)
    return f'<div class="faces {size}">{"".join(figures)}</div>'


@contextmanager
def on_page():
    """Make a UserError a message on the page, which goes on; other errors keep their traceback."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(re.sub(r"^--[\w-]+:? | \(--.*?\)", "", str(error))), print_exception=False) from None


def add_player(generator, route, tuned):
    """Add a route's face, slider and film to the page; return a function that shows a new route, and its outputs.

    route: a State, [(name, (nz,) latent), ...]. tuned: a State, the generator to use instead of `generator`, or None.
    """
    face = gr.HTML(HINT, elem_classes="face")
    where, strip = gr.Slider(0, 100, 0, step=0.1, label="Along the route, in percent", buttons=[]), gr.HTML()
    with gr.Accordion("Film"):
        with gr.Row():
            pace = gr.Radio([("even steps", "latent"), ("even to the eye", "perceptual")], value="latent", label="Pace")
            ending = gr.Radio([("GIF", ".gif"), ("MP4", ".mp4")], value=".gif", label="File")
        frames = gr.Slider(2, 100, 25, step=1, label="Frames from face to face", buttons=[])
        loop = gr.Checkbox(label="Back to the first face")
        make = gr.Button("Make the film", variant="primary")
        film = gr.HTML(elem_classes="face", min_height=100)  # room for the progress
        download = gr.DownloadButton("Download the film", visible=False)

    def look(route, tuned, percent, loop):
        if not route:
            return HINT
        z = torch.stack([z for _, z in route])  # (n, nz)
        z = Interpolation.path(z, [percent / 100 * (len(z) - 1 + loop)])  # (1, nz)
        return to_tag(Interpolation.faces(tuned or generator, z)[0], "the face at the slider")

    def show(route, tuned=None):
        percent = 100 if route else 0  # the face that was added last
        z = torch.stack([z for _, z in route]) if route else torch.empty(0, generator.nz)
        row = row_of(Interpolation.faces(tuned or generator, z), [name for name, _ in route])
        return look(route, tuned, percent, False), row, percent, False, "", gr.DownloadButton(visible=False)

    @on_page()
    def shoot(route, tuned, frames, pace, loop, ending, progress=gr.Progress()):  # noqa: B008, gradio's way
        if len(route) < 2:
            raise UserError("choose two faces or more first")
        Interpolation.pick_seeds([name for name, _ in route], 1, loop)  # raises where one follows itself
        model = tuned or generator
        z, _ = Interpolation.route(model, [z for _, z in route], int(frames), pace=pace, loop=loop)
        shots = partial(Interpolation.film, model, scale=max(1, 256 // model.size))
        out = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")), f"morph{ending}")
        pictures = progress.tqdm(shots(z[:, None]), total=len(z), desc="film")
        Interpolation.write_film(out, pictures, 25, shots(z[:: len(z) // 32 + 1, None]))
        kind, tag = ("video", "video autoplay loop muted controls") if ending == ".mp4" else ("image", "img")
        data = base64.b64encode(out.read_bytes()).decode()
        return f'<{tag} src="data:{kind}/{ending[1:]};base64,{data}">', gr.DownloadButton(value=str(out), visible=True)

    follow = {"queue": False, "trigger_mode": "always_last"} | HIDDEN  # no waiting behind what is slow
    gr.on([where.input, loop.input], look, [route, tuned, where, loop], face, **follow)
    make.click(shoot, [route, tuned, frames, pace, loop, ending], [film, download], show_progress_on=film)
    return show, [face, strip, where, loop, film, download]


def add_morph(generator, known):
    """Add the tab Morph: a sheet of faces, a click on which adds to the route. known: {name: latent} to show first."""

    def sheet(page):
        names = [*known, *range(SHEET * (page + 1))][SHEET * page : SHEET * (page + 1)]
        stops = [(str(name), known[name] if name in known else latent(name, generator.nz)) for name in names]
        x = Interpolation.faces(generator, torch.stack([z for _, z in stops]))
        return stops, [(to_image(x), name) for x, (name, _) in zip(x, stops, strict=True)]

    page, route, tuned = gr.State(0), gr.State([]), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=320):
            look = {"columns": 6, "height": "auto", "object_fit": "cover", "allow_preview": False, "buttons": []}
            gallery = gr.Gallery(sheet(0)[1], label="Faces: click to add", elem_id="sheet", **look)
            with gr.Row():
                more, back, clear = (gr.Button(text, min_width=90) for text in ("More faces", "Remove last", "Clear"))
        with gr.Column(min_width=320):
            show, outputs = add_player(generator, route, tuned)

    def add(page, route, event: gr.SelectData):
        route = [*route, sheet(page)[0][event.index]]
        return gr.Gallery(selected_index=None), route, *show(route)

    gallery.select(add, [page, route], [gallery, route, *outputs], **HIDDEN)
    more.click(lambda page: (page + 1, sheet(page + 1)[1]), page, [page, gallery])
    back.click(lambda route: (route[:-1], *show(route[:-1])), route, [route, *outputs], **HIDDEN)
    clear.click(lambda: ([], *show([])), None, [route, *outputs], **HIDDEN)


def score(game, answers):
    """Return the score of a game, [(face, is real), ...], beside that of chance, and the faces, as HTML."""
    faces, truth = zip(*game, strict=True)
    kinds = ["right" if real == answer else "wrong" for real, answer in zip(truth, answers, strict=True)]
    right, count = kinds.count("right"), len(kinds)
    luck = sum(comb(count, k) for k in range(right, count + 1)) / 2**count
    chance = f"Tossing a coin gives {count // 2} on average, {right} or more in {luck:.0%} of games."
    row = row_of(faces, ["real" if real else "generated" for real in truth], kinds, "many")
    return f"<h3>{right} of {count} right. {chance}</h3>{row}"


def add_game(generator, data, crop):
    """Add the tab Real or generated?; the images are opened, and packed if need be, when the first game begins."""
    if not data:
        return gr.Markdown("This game needs real faces: start the page with `--data PATH`, a zip or a folder of them.")
    images = cache(lambda: open_data(data, generator.size, crop))  # an event runs once at a time, so it packs once
    head, game, answers = gr.Markdown(f"Which of {ROUNDS} faces are real people?"), gr.State([]), gr.State([])
    face, start = gr.HTML(elem_classes="face"), gr.Button("New game", variant="primary")
    with gr.Row():
        buttons = [gr.Button(text, visible=False, min_width=90) for text in ("Real", "Generated")]
    outputs = [game, answers, head, face, start, *buttons]

    def turn(game, answers):
        over = len(answers) == len(game)
        head = "Green where you were right, red where not." if over else f"Face {len(answers) + 1} of {len(game)}"
        face = score(game, answers) if over else to_tag(game[len(answers)][0], "real or generated?")
        return game, answers, head, face, gr.Button(visible=over), *[gr.Button(visible=not over)] * 2

    @on_page()
    def begin():
        dataset, game = images(), []
        for real in random.choices([True, False], k=ROUNDS):
            z = latent(random.randrange(2**32), generator.nz)[None]
            x = dataset.batch([random.randrange(len(dataset))]) if real else Interpolation.faces(generator, z)
            game.append((x[0].cpu(), real))
        return turn(game, [])

    start.click(begin, None, outputs)
    for button, answer in zip(buttons, (True, False), strict=True):
        button.click(lambda game, all, a=answer: turn(game, [*all, a]), [game, answers], outputs, **HIDDEN)


def add_photos(generator, crop):
    """Add the tab Your photos: upload, tune, then what Morph has."""
    people, route, tuned = gr.State([]), gr.State([]), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=320):
            upload = gr.File(label="Two photos or more, a face in each", file_count="multiple", height=160)
            sheet, fit = gr.HTML(), gr.Button("Morph these people", variant="primary")
            clear, result = gr.Button("Start again"), gr.HTML(min_height=100)  # room for the progress
        with gr.Column(min_width=320):
            show, outputs = add_player(generator, route, tuned)

    def read(paths, people):
        for path in map(Path, paths):
            try:
                face = photos.read_face(path, generator.size, crop)
                people = [*people, (f"{len(people) + 1} {path.stem[:12]}", face)]
            except UserError as error:
                gr.Warning(html.escape(str(error).removeprefix("--photos ").replace(str(path), path.name)))
            finally:
                path.unlink(missing_ok=True)
        return None, people, row_of([x for _, x in people], [name for name, _ in people], size="many")

    @on_page()
    def become(people, progress=gr.Progress()):  # noqa: B008
        if len(people) < 2:
            raise UserError("add two photos with a face or more first")
        names, faces = zip(*people, strict=True)
        model, z, lines = photos.fit(generator, list(faces), progress.tqdm)
        route = list(zip(names, z, strict=True))
        text = "".join(f"<p>{html.escape(name)}: {line}</p>" for name, line in zip(names, lines, strict=True))
        return text, model, route, *show(route, model)

    upload.upload(read, [upload, people], [upload, people, sheet], show_progress_on=upload, trigger_mode="multiple")
    fit.click(become, people, [result, tuned, route, *outputs], show_progress_on=result)
    clear.click(lambda: ([], "", "", None, [], *show([])), None, [people, sheet, result, tuned, route, *outputs])


def add_models(page, folder, device):
    """Add the tab Which model?: the faces of the same seeds at each checkpoint in `folder`, or of a run."""
    folders = dict.fromkeys(path.resolve() for path in (folder, *sorted(Path("runs").glob("*/"), reverse=True)))
    runs = {str(folder): list_models(folder) for folder in folders if any(folder.glob("*.pt"))}
    if not runs:
        return gr.Markdown("No model files (`*.pt`) in runs/ or beside the page's own.")
    run = gr.Dropdown([(Path(run).name, run) for run in runs], value=next(iter(runs)), label="Run")
    step, faces = gr.Slider(1, 2, 1, step=1, label="Checkpoint", buttons=[]), gr.HTML()

    @on_page()
    def draw(run, k):
        generator = load_generator(file := runs[run][min(int(k), len(runs[run])) - 1], device)
        x = Interpolation.faces(generator, torch.stack([latent(seed, generator.nz) for seed in range(12)]))
        return f"<h3>{html.escape(file.name)}</h3>" + row_of(x, [f"seed {seed}" for seed in range(12)], size="many")

    def choose(run):
        count = len(runs[run])
        return gr.Slider(maximum=max(count, 2), value=count, visible=count > 1), draw(run, count)

    gr.on([page.load, run.input], choose, run, [step, faces])
    step.input(draw, [run, step], faces, trigger_mode="always_last", **HIDDEN)


def build(model, data=None, device="cpu"):
    """Return the page, a gradio Blocks, for the values of --model, --data and --device."""
    path, file, generator = Interpolation.open_model(model, device)
    with gr.Blocks(title="FaceFusion", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# FaceFusion\nFaces of people who do not exist, and the way from one to the next.")
        with gr.Tab("Morph"):
            add_morph(generator, photos.tuned_latents(file, path) if "photos" in file else {})
        with gr.Tab("Real or generated?"):
            add_game(generator, data, photos.crop_of(file))
        with gr.Tab("Your photos"):
            add_photos(generator, photos.crop_of(file))
        with gr.Tab("Which model?"):
            add_models(page, path.parent, device)
    return page


def serve(argv):
    """Show the page that the command line asks for until Ctrl-C. Raises UserError for bad flags and without gradio."""
    parser = Parser(__doc__)
    parser.add_argument("--model", type=filled_path, default=Interpolation.SHIPPED, help="a file, a folder, or latest")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    add_flags(parser, "device")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="zips or folders of real faces, for the game")
    args = parser.parse_args(argv)
    if gr is None:
        raise UserError("the page needs gradio: pip install gradio")
    choose_paths(args.data or ["drawn"])  # raises where one is not there
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0  # cores: a thread that waits for one of them
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() - busy)))  # makes a face 20 times as slow
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as Ctrl-C does, which clears the folder
    with tempfile.TemporaryDirectory(prefix="facefusion-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        page = build(args.model, args.data, pick_device(args.device))
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others come from a CDN
        look = {"theme": theme, "css_paths": Path(__file__).with_suffix(".css"), "footer_links": [], "ssr_mode": False}
        try:
            page.launch(server_name=args.host, server_port=args.port, share=False, max_file_size="50mb", **look)
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {args.host} --port {args.port}: cannot listen there; choose another") from error


def main(argv=None):
    return run_command(serve, argv)


if __name__ == "__main__":
    sys.exit(main())
