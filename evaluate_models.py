"""Which model is the best, and how did it get there? Pictures of a run, and a table of distances to real faces."""

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import shlex
import signal
import sys
from functools import partial
from itertools import count

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds, in which Ctrl-C ends without a word

import torch

import metrics
from checkpoints import base_names, generator_only, list_models, load_generator, read_model_file
from command_line import Parser, UserError, filled_path, new_file, run_command
from Dataset import SPLITS, epoch_order, open_data
from device import pick_device, prepare
from Interpolation import SEEDS, faces
from pictures import draw_evolution, evenly, plot_curves, seed_faces, write
from settings import add_flags, checked

FEWEST = 2048  # images below which a distance says more about their number than about the model
COUNTED = 1000  # images on which faces are counted, at most: the detector is the slowest part
FILMED = 100  # checkpoints in the film of a run, at most
CRITIC = "critic real - fake"
PRIVATE = ("out", "cache", "resume", "device", "workers")  # settings that say where a model was trained, not how
TERMS = """
**Terms.** CelebA may be used for non-commercial research only, and so may what was learnt from it.

**Limits.** CelebA shows celebrities as press photographs do: mostly young, light-skinned, made up and smiling. A model
of it draws such people, and worse the rarer somebody's looks are there. Its faces belong to nobody, but one may
resemble somebody. Do not use them to pretend that a person exists, said or did something, to judge or recognise
people, or as a picture of what people look like.
"""


def name_folders(folders):
    """Return {name: folder}, named by the last part of its path, or by as many of the last as tell them all apart."""
    folders = {folder.resolve(): folder for folder in folders}
    for depth in count(1):
        names = {"-".join(path.parts[-depth:]): folder for path, folder in folders.items()}
        if len(names) == len(folders):
            return names


def choose_real(args, size):
    """Return two disjoint sets of real images, each a (dataset, indices): the reference, and the one for the floor.

    The floor comes from --floor-split, else the two share --split. Either has at most --samples images, in a fixed
    random order. Raises UserError where they would be too few.
    """
    splits = (args.split, args.floor_split or args.split)
    data = [open_data(args.data, size, args.crop, split, args.cache, args.workers) for split in splits]
    reference, floor = (epoch_order(len(dataset), 0, 0) for dataset in data)
    if not args.floor_split:
        reference, floor = reference.tensor_split([min(args.samples, len(reference) // 2)])
    chosen = [reference[: args.samples], floor[: args.samples]]
    if min(map(len, chosen)) < (2 if args.quick else FEWEST):
        numbers = f"{len(chosen[0])} images as reference and {len(chosen[1])} for the floor"
        way_out = "take more data, another --split, a --floor-split, or --quick, which marks the numbers"
        raise UserError(f"--data: {numbers}, and fewer than {FEWEST} say little; {way_out}")
    return list(zip(data, chosen, strict=True))


def held_out(file, dataset):
    """Return "yes", "no" or "unknown": whether the model of this file was trained without the dataset's images."""
    settings, data = file.get("settings") or {}, (file.get("made_by") or {}).get("data")
    if isinstance(data, dict) and data.get("fingerprint") == dataset.fingerprint:
        return "no"
    apart = dataset.split != "all" and settings.get("split") in {*SPLITS} - {dataset.split}
    from_another = settings.get("grow_from") or settings.get("start_from")  # nothing tells what that one has seen
    return "yes" if apart and not from_another else "unknown"


class Table:
    """Models of one image size, measured alike: `protocol` says how, `rows` holds a dict of numbers for each.

    The first row compares real images with real ones: no model can be expected to get below it.
    """

    def __init__(self, size, args, extractor, detector, device):
        (data, self.indices), (floor, floor_indices) = choose_real(args, size)
        self.data, self.args, self.extractor, self.detector, self.device = data, args, extractor, detector, device
        self.protocol = {"size": size, "data": data.name, "split": data.split, "crop": data.crop}
        network, resize = f"{args.features}-{metrics.weights_hash(extractor)}", metrics.RESIZE[args.features]
        self.protocol |= {"reference images": len(self.indices), "extractor": network, "resize": resize}
        self.protocol |= {"fingerprint": data.fingerprint, "seed": args.seed, "quick": args.quick}
        self.reference = metrics.features_of(data.batch, self.indices, extractor, device)
        first = {"model": f"real images, split {floor.split}, others than the reference", "step": None}
        self.rows = [first | self.judge(floor.batch, floor_indices)]

    def judge(self, batch, inputs):
        """Return what is measured of the images that batch() makes of `inputs`, indices or latents."""
        features = metrics.features_of(batch, inputs, self.extractor, self.device)
        numbers = metrics.compare(features, self.reference, metrics.METRICS[self.args.features].values())
        shares = metrics.face_shares(batch, inputs[:COUNTED], self.detector) if self.detector else {}
        return {"N": len(inputs)} | numbers | shares

    def add(self, path, file, generator):
        """Measure a model, given the dict of its file."""
        random = torch.Generator().manual_seed(self.args.seed)
        z = torch.randn(self.args.samples, generator.nz, generator=random)  # (N, nz)
        row = {"model": str(path), "step": file.get("step"), "held out": held_out(file, self.data)}
        row |= self.judge(partial(faces, generator), z)
        if file.get("critic"):
            try:
                row[CRITIC] = metrics.critic_gap(file, generator, self.data, self.indices, z, self.device)
            except UserError as error:
                print(f"{path}: {error}; it is not asked")
        self.rows.append(row)
        crop = (file.get("settings") or {}).get("crop", self.args.crop)
        if crop != self.args.crop:
            print(f"Note: {path} was trained with --crop {crop}, it is compared with {self.args.crop}.")

    def __str__(self):
        """The table as text, with all that its numbers depend on above it."""
        mark = "*" if self.args.quick else ""
        kinds = {float: lambda x: f"{x:.3f}{mark}", int: "{:,}".format, type(None): lambda _: "-"}
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        rows = [[kinds.get(type(value), str)(value) for value in map(row.get, columns)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (columns, *rows)]
        head = listed(self.protocol) + (f"; faces counted on {COUNTED:,} images at most" if self.detector else "")
        head += "; * too few images to be compared with other numbers" if mark else ""
        return "\n".join([head, lines[0], "-" * len(lines[0]), *lines[1:]])


def listed(values):
    return ", ".join(f"{key} {value}" for key, value in values.items())


def write_csv(tables, path):
    """Write all rows, each with all that its numbers depend on, so that a row can be read by itself."""
    rows = [row | table.protocol for table in tables for row in table.rows]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def choose_best(rows, metric):
    """Return the row with the lowest `metric`, of the critic's the one nearest to 0; not the first row; or None."""
    models = [row for row in rows[1:] if row.get(metric) is not None and math.isfinite(row[metric])]
    return min(models, key=lambda row: abs(row[metric]) if metric == CRITIC else row[metric], default=None)


def lean(file, name):
    """Return the dict of the model file `name` as it is shared: its generator in half the bytes, no PRIVATE settings.

    Matrices and kernels become float16, which moves no pixel by more than a grey level. Vectors stay: BatchNorm's
    statistics are among them, whose range is unbounded. Raises UserError for what cannot be loaded.
    """
    file = generator_only(file)
    state = file["generator"]["state"]
    for key, tensor in state.items():
        state[key] = tensor.half() if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
    load_generator(file, name=name)
    settings = {key: value for key, value in file["settings"].items() if key not in PRIVATE}
    return file | {"settings": settings}


def share(file, target, note, keep_note=False):
    """Write a lean file as `target`, and beside it a card, .md, and the note, .json, or else the sha256.

    All is made before any of it is written. The model comes last: by its sha256 a set that a kill tore is noticed.
    """
    buffer = io.BytesIO()
    torch.save(file, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    beside = {".pt.sha256": f"{digest}  {target.name}\n"}  # as sha256sum writes it
    if keep_note:
        beside = {".json": json.dumps(note | {"sha256": digest}, indent=2) + "\n"}
    beside[".md"] = model_card(file, target.name, digest, note)
    for suffix, text in beside.items():
        write(target.with_suffix(suffix), lambda path, text=text: path.write_text(text, "utf-8", "replace"))
    write(target, lambda path: path.write_bytes(buffer.getvalue()))


def read_note(model):
    """Return the note that keep_best wrote beside a model file, None where there is none.

    Raises UserError where it is damaged, or about another model, as after a kill between the two.
    """
    path = model.with_suffix(".json")
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        note, digest = json.loads(path.read_text(encoding="utf-8")), hashlib.sha256(model.read_bytes()).hexdigest()
        whole = re.fullmatch(r"[\w -]{1,40}", note["metric"]) and abs(note["value"]) < 1e9 and 0 < note["N"] < 1e9
        if whole and listed(note["protocol"]) and note.get("sha256", digest) == digest:
            return note
    raise UserError(f"{path}: damaged, or not about {model.name} as it is now; move it away")


def keep_best(table, file, metric, args):
    """Copy the best model of a table, whose lean file is `file`, to --bests, with a note how it was chosen and a card.

    Raises UserError where, without --force, the model there is as good, or was measured in another way.
    """
    row, target = choose_best(table.rows, metric), args.bests / f"generator_{table.protocol['size']}.pt"
    if row is None:
        raise UserError(f"--by {args.by}: no model here has a finite {metric}; a critic is in full checkpoints only")
    note = {"metric": metric, "value": row[metric], "N": row["N"], "protocol": table.protocol}
    if target.exists() and not args.force:
        if (old := read_note(target)) is None:
            raise UserError(f"--bests: {target} is there, and nothing says how good it is; --force replaces it")
        here = f"--bests: {target} has {old['metric']} {old['value']:.3f}"
        if any(old[key] != note[key] for key in ("metric", "N", "protocol")):
            raise UserError(f"{here} measured in another way; measure it beside the new one, or --force replaces it")
        if choose_best([{}, {metric: old["value"]}, row], metric) is not row:
            raise UserError(f"{here} and stays, the best here has {row[metric]:.3f}")
    args.bests.mkdir(parents=True, exist_ok=True)
    print(f"best by {metric}: {row['model']}, {row[metric]:.3f}")
    note |= {"floor": table.rows[0].get(metric), "row": row, "command": args.command}
    share(file, target, note, keep_note=True)


def export(path, target, force):
    """Write the model of `path` to share. Raises UserError where `target` is that one, or exists without `force`."""
    if target.exists() and (target.samefile(path) or not force):
        raise UserError(f"--export {target}: is there already; choose another name, or --force replaces another model")
    share(lean(read_model_file(path), path), target, read_note(path))


def model_card(file, name, digest, note):
    """Return a short description of a lean file in Markdown: what it is, how it was made and is used."""
    config, made_by, data = file["generator"]["config"], file["made_by"], file["made_by"].get("data")
    millions = sum(tensor.numel() for tensor in file["generator"]["state"].values()) / 1e6
    lines = [
        f"# {name.removesuffix('.pt')}",
        f"Generator of a Wasserstein GAN: {config['nz']} standard normal numbers -> a face of {config['size']} x "
        f"{config['size']} pixels. {millions:.1f} million weights, step {file['step']}.\n",
        f"- sha256: `{digest}`",
        f"- trained on: {listed(data) if isinstance(data, dict) else data}",
        "- made by: " + ", then ".join(f"`{line}`" for line in str(made_by.get("command")).splitlines()),
    ]
    if note:
        lines += [f"- {note['metric']}: {note['value']:.3f} (N {note['N']:,}, {listed(note['protocol'])})"]
    lines += ["", f"Use it: `python Interpolation.py --model {name}`", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in (file["settings"] | config).items()]
    return "\n".join(lines) + "\n" + TERMS


def parse(argv=None):
    """Return the flags. Raises UserError for those that cannot be met, before anything is computed."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("models", nargs="+", type=filled_path, help="folders of runs, and model files")
    add("--out", type=filled_path, default="evaluation", metavar="DIR", help="folder for pictures and tables")
    add("--checkpoints", type=checked(int, "[0, inf)"), default=12, help="of a run at most so many, evenly; 0: all")
    add_flags(parser, "device")
    add = parser.add_argument_group("pictures").add_argument
    add("--seeds", type=checked(int, "[0, 4294967295]"), nargs="+", default=SEEDS, help="the faces that are followed")
    add("--movie", choices=["gif", "mp4"], default="gif", help="format in which the faces emerge")
    add("--fps", type=checked(int, "[1, 50]"), default=5, help="checkpoints a second in it")
    add("--tag", default="loss/critic", help="scalar of the runs that is plotted")
    add("--figures-only", action="store_true", help="measure nothing")
    group = parser.add_argument_group("table")
    add_flags(group, "data", "split", "crop", "cache", "workers")
    add = group.add_argument
    add("-n", "--samples", type=checked(int, "[2, inf)"), default=10_000, help="images of each model and of the data")
    add("--floor-split", choices=[*SPLITS], help="where the real images of the first row come from, else from --split")
    add("--features", choices=[*metrics.METRICS], default="inception", help="inception: FID, KID; else FD, KD")
    add("--weights", type=filled_path, metavar="FILE", help="weights of the extractor, else they are downloaded")
    add("--seed", type=checked(int, "[0, 4294967295]"), default=0, help="chooses the latents that are measured")
    add("--quick", action="store_true", help=f"allow fewer than {FEWEST} images, and mark the numbers")
    add = parser.add_argument_group("the best").add_argument
    add("--by", choices=["fid", "kid", "fd", "kd", "critic"], help="copy the best by this to --bests")
    add("--bests", type=filled_path, metavar="DIR", default="bests", help="folder of the best models")
    add("--export", type=new_file(".pt"), metavar="FILE", help="only write the model, of a run its newest, to share")
    add("--force", action="store_true", help="let --by and --export replace what is there")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "evaluate_models.py", *base_names(sys.argv[1:] if argv is None else argv)])
    for path in args.models:
        if not path.exists():
            raise UserError(f"{path}: no such model file or run folder")
    if args.samples < FEWEST and not args.quick:
        raise UserError(f"--samples {args.samples}: fewer than {FEWEST} say little about a model; --quick allows them")
    if args.by and args.figures_only:
        raise UserError(f"--by {args.by}: nothing is measured with --figures-only; leave one of them out")
    if args.by not in (None, "critic", *(names := metrics.METRICS[args.features])):
        raise UserError(f"--by {args.by}: --features {args.features} measures {' and '.join(names)}")
    if args.floor_split and args.split in ("all", args.floor_split):
        raise UserError(f"--floor-split {args.floor_split}: shares images with --split {args.split}; name another one")
    if args.export and len(args.models) > 1:
        raise UserError(f"--export {args.export}: name one model or run to share, not {len(args.models)}")
    return args


def evaluate(argv=None):
    """Do what the flags say: pictures, table, best; or the export alone."""
    args = parse(argv)
    device = pick_device(args.device)
    prepare(device)
    # A group for each folder, and one for all model files that were named by themselves.
    folders = name_folders([path for path in args.models if path.is_dir()])
    groups = {name: list_models(folder) for name, folder in folders.items()}
    if files := [path for path in args.models if not path.is_dir()]:
        groups["models" if "models" not in folders else "single_models"] = files
    if args.export:
        return export(next(iter(groups.values()))[-1], args.export, args.force)
    if not args.figures_only:
        extractor = metrics.load_extractor(args.features, args.weights, device)
        detector = metrics.load_face_detector(device)
    args.out.mkdir(parents=True, exist_ok=True)

    metric = CRITIC if args.by == "critic" else metrics.METRICS[args.features].get(args.by)
    tables, best = {}, {}  # {size: Table}, and the lean file of the best model of each
    for name, paths in groups.items():
        shown, filmed, pictures = evenly(paths, args.checkpoints), evenly(paths, FILMED), {}
        measured = [] if args.figures_only else shown if name in folders else paths
        for path in [path for path in paths if path in {*shown, *filmed, *measured}]:
            file = read_model_file(path)  # once for all that is done with it
            generator, step = load_generator(file, device, path), file.get("step")
            pictures[path] = (path.stem[-12:] if step is None else f"{step:,}"), seed_faces(generator, args.seeds)
            if path in measured:
                size = generator.size
                if size not in tables:
                    tables[size] = Table(size, args, extractor, detector, device)
                tables[size].add(path, file, generator)
                if args.by and choose_best(tables[size].rows, metric) is tables[size].rows[-1]:
                    best[size] = lean(file, path)
        some = ([pictures[path] for path in paths] for paths in (shown, filmed))
        draw_evolution(args.out / name, *some, args.seeds, args.movie, args.fps)
    plot_curves(folders, args.tag, args.out / f"{args.tag.replace('/', '_')}.png")
    if tables:
        text = "\n\n".join(map(str, tables.values()))
        print(f"\n{text}\n")
        write(args.out / "models.txt", lambda path: path.write_text(text + "\n", encoding="utf-8"))
        write(args.out / "models.csv", partial(write_csv, tables.values()))
    for size, table in tables.items() if args.by else ():
        keep_best(table, best.get(size), metric, args)


def main(argv=None):
    return run_command(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
