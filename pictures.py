"""How a model got there: the faces of fixed seeds at each checkpoint, as a picture and a film, and a run's curve."""

import math
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from atomic_write import atomic_write
from Generator import latent, to_uint8
from Interpolation import faces, write_film


def evenly(items, count):
    """Return at most `count` of a list's items, evenly spread, the last and (of two or more) the first too; 0: all."""
    if count == 0 or len(items) <= count:
        return items
    return [items[i] for i in np.linspace(len(items) - 1, 0, count).round().astype(int)[::-1]]


def seed_faces(generator, seeds):
    """Return the faces that a model gives for `seeds`: (len(seeds), 3, size, size) uint8 on the CPU."""
    return to_uint8(faces(generator, torch.stack([latent(seed, generator.nz) for seed in seeds]))).cpu()


def draw_sheet(pictures, across, labels, seeds=()):
    """Return an image of (N, 3, S, S) uint8 pictures in rows of `across`, labels above and `seeds` before the rows."""
    from torchvision.utils import make_grid  # slow to import

    scale = math.ceil(96 / pictures.shape[3])  # small faces are shown larger
    pictures = nn.functional.interpolate(pictures, scale_factor=scale)  # nearest
    grid = Image.fromarray(make_grid(pictures, across, pad_value=255).permute(1, 2, 0).numpy())
    font = ImageFont.load_default(14)
    left = max((int(font.getlength(str(seed))) + 16 for seed in seeds), default=0)
    page = Image.new("RGB", (left + grid.width, 28 + grid.height), "white")
    page.paste(grid, (left, 28))
    draw = ImageDraw.Draw(page)
    for i, label in enumerate(labels):
        draw.text((left + (i + 0.5) * grid.width / len(labels), 14), label, "black", font, anchor="mm")
    for i, seed in enumerate(seeds):
        draw.text((left - 8, 28 + (i + 0.5) * grid.height / len(seeds)), str(seed), "black", font, anchor="rm")
    return page


def draw_evolution(path, shown, filmed, seeds, ending, fps):
    """Write PATH_faces.png, the report's figure 3 (a row a seed, a column a model), and the film PATH_faces.ENDING.

    shown, filmed: lists of (label, faces as seed_faces returns them).
    """
    labels, pictures = zip(*shown, strict=True)
    side = max(picture.shape[3] for picture in pictures)
    pictures = torch.stack([nn.functional.interpolate(picture, side) for picture in pictures], 1)  # (seeds, models, ..)
    write(f"{path}_faces.png", draw_sheet(pictures.flatten(0, 1), len(labels), labels, seeds).save)
    if len(filmed) > 1 and len({picture.shape for _, picture in filmed}) == 1:
        across = math.ceil(math.sqrt(len(seeds)))
        frames = [np.asarray(draw_sheet(picture, across, [f"step {label}"])) for label, picture in filmed]
        frames += [frames[-1]] * fps  # the last face stays for another second
        film = Path(f"{path}_faces.{ending}")
        write_film(film, frames, fps, evenly(frames, 8))
        print(f"wrote {film}")


def write(path, save):
    """Have save(temporary path) write a whole file, and give it its name."""
    with atomic_write(path) as temporary:
        save(temporary)
    print(f"wrote {path}")


def read_scalar(run, tag):
    """Return the steps and the finite values of a scalar in a run's TensorBoard files: two float64 arrays."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return np.array([(p.step, p.value) for p in points if math.isfinite(p.value)], float).reshape(-1, 2).T


def smooth(values, weight=0.9):
    """Exponential moving average without the bias towards its start, as TensorBoard draws it: (N,) -> (N,)."""
    sums = (list(accumulate(x, lambda total, y: weight * total + y)) for x in (values, np.ones(len(values))))
    return np.divide(*sums)


def plot_curves(runs, tag, path):
    """Plot a scalar of {name: run's folder}: the smoothed line over the faint raw one, spikes cut off."""
    curves = {name: read_scalar(folder, tag) for name, folder in runs.items()}
    for name in [name for name, (steps, _) in curves.items() if not len(steps)]:
        print(f"{name}: no scalar {tag} in its TensorBoard files, so it is not in the plot")
        del curves[name]
    if not curves:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No plot of {tag}: `pip install matplotlib` adds it, and TensorBoard shows the same.")
        return
    figure = Figure((9.6, 5.4), layout="tight")
    axes = figure.subplots()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        axes.plot(steps, values, f"C{i}", alpha=0.35, linewidth=0.8)
        axes.plot(steps, smooth(values), f"C{i}", label=f"{name}   last {smooth(values)[-1]:.3g}")
    low, high = np.percentile(np.concatenate([values for _, values in curves.values()]), [1, 99])
    margin = 0.1 * (high - low) or 0.5
    axes.set(title=tag, xlabel="step", ylim=(low - margin, high + margin))
    axes.legend()
    write(path, figure.savefig)
