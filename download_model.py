"""Fetch the models that the report published, or a shared one, into models/. A file gets its name once it is whole."""

import hashlib
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds, in which Ctrl-C ends without a word

import torch

from atomic_write import atomic_write
from checkpoints import load_generator, read_model_file, step_of
from command_line import Parser, UserError, filled_path, run_command

DRIVE_IDS = {
    "generator_model_batch_12000.pt": "1MbFbA4S_UecZPw4BhoaOc1H83QwluuZf",
    "generator_model_batch_300000.pt": "17zuSetRxGMNBDQS1k7PJWLGM-15kyLap",
    "generator_model_batch_2166000.pt": "1t1Yy5uDD-zf-X-1XBSGi7aOdrHRwA7oC",
    "generator_model_batch_3462000.pt": "1J4EUE5xSUsuS7cuaSqsTwyzW6ZxmAx5y",
    "generator_model_batch_3924000.pt": "1j1xoJSWPUxM-GNpfxX0kDYNl1wYjR3Dz",
}
PUBLISHED_PARAMETERS = 20_362_819
DRIVE = "https://drive.google.com/file/d/"


def fetch(url, path):
    """Download `url` to `path`; return the sum in the file beside it (.sha256), None without one. Raises UserError."""
    try:
        if url.startswith(DRIVE):
            import gdown

            with open(path, "wb") as file:
                gdown.download(id=url.removeprefix(DRIVE).split("/")[0], output=file, timeout=60)
            return None
        socket.setdefaulttimeout(60)  # seconds without a byte; torch.hub would wait for ever
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        try:
            beside = urlsplit(url)._replace(path=urlsplit(url).path + ".sha256").geturl()
            with urllib.request.urlopen(beside) as response:
                found = re.match(rb"([0-9a-fA-F]{64})\b", response.read(1024))
                return found and found[1].decode()
        except urllib.error.HTTPError as error:
            if error.code not in (403, 404, 410):
                raise
    except Exception as error:  # many types, those of gdown, requests, urllib and http and the system's
        raise UserError(f"it did not come ({' '.join(str(error).split())})") from error


def check(path, name, sha256=None):
    """Return (dict, sha256) of a model file. Raises UserError unless it is whole, and what its name and sum say."""
    file = read_model_file(path)
    generator = load_generator(file)
    came = hashlib.sha256(path.read_bytes()).hexdigest()
    if name in DRIVE_IDS:
        came = (file.get("made_by") or {}).get("sha256", came)  # of the file before it was written anew
        parameters = sum(p.numel() for p in generator.parameters())
        if parameters != PUBLISHED_PARAMETERS:
            raise UserError(f"it has {parameters:,} parameters, the report's generator {PUBLISHED_PARAMETERS:,}")
    if sha256 and came != sha256.lower():
        raise UserError(f"its sha256 is {came}, not {sha256}")
    return file, came


def download(name, url, folder, sha256=None):
    """Fetch the model `name` into `folder`, with the sum `sha256` or else the one beside `url`; keep one that is there.

    The report's pickles are written anew in this project's format; others stay as they came. Raises UserError.
    """
    target = folder / name
    if target.is_file():
        try:
            check(target, name, sha256)
        except UserError as error:
            reason = str(error).replace(f"{target} is", "it is")
            raise UserError(f"{target} is there, but {reason}; move it away and run this again") from error
        return print(f"{target} is there already")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:  # removes what killed processes left, but for torch.hub's own temporaries
        for partial in folder.glob(".*.tmp-*.partial"):
            if not partial.with_suffix("").with_suffix("").exists():
                partial.unlink()
        try:
            beside = fetch(url, temporary)
            file, came = check(temporary, name, sha256 or beside)
        except UserError as error:
            reason = str(error).replace(str(temporary), "it")
            ways = f"later if Google Drive's quota is used up, or open {url} in a browser and save the file as {target}"
            raise UserError(f"{name} was not kept: {reason}. Run this again, {ways}, or take --from") from error
        if name in DRIVE_IDS:
            made_by = (file.get("made_by") or {}) | {"source": url, "sha256": came}
            torch.save(file | {"step": step_of(target), "made_by": made_by}, temporary)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def fetch_models(argv):
    """Fetch or list what the command line asks for. What it cannot ask for is refused before anything is fetched."""
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help="published models by name or step; all five without")
    parser.add_argument("--list", action="store_true", help="show name, step, size and what is there; fetch nothing")
    parser.add_argument("--from", dest="mirror", metavar="URL", help="folder of a mirror, or one model file (.pt)")
    parser.add_argument("--sha256", metavar="HEX", help="sum that the one file fetched must have")
    parser.add_argument("--out", type=filled_path, default="models", metavar="FOLDER", help="where the models go")
    args = parser.parse_args(argv)
    names = [name if name in DRIVE_IDS else f"generator_model_batch_{name}.pt" for name in args.names or DRIVE_IDS]
    if unknown := set(names) - set(DRIVE_IDS):
        raise UserError(f"{' '.join(args.names)}: no published model {min(unknown)}; --list shows all")
    jobs = {name: f"{DRIVE}{DRIVE_IDS[name]}/view" for name in names}
    if args.mirror is not None:
        url = urlsplit(args.mirror)
        one = url.path.endswith(".pt")
        if url.scheme not in ("http", "https") or not url.netloc or (one and args.names):
            raise UserError(f"--from {args.mirror}: give a folder's URL (http or https), or that of a .pt and no name")
        jobs = {Path(url.path).name: args.mirror} if one else {n: f"{args.mirror.rstrip('/')}/{n}" for n in names}
    if args.sha256 is not None and (len(jobs) != 1 or not re.fullmatch("[0-9a-fA-F]{64}", args.sha256)):
        raise UserError(f"--sha256 {args.sha256}: 64 hexadecimal digits, for one file only; name that file")
    if args.list:
        print(f"{'name':<34}{'step':>9}{'MB':>8}  in {args.out}")
        for path in dict.fromkeys([*(args.out / name for name in DRIVE_IDS), *sorted(args.out.glob("*.pt"))]):
            there, step = path.is_file(), step_of(path)
            size = path.stat().st_size if there else 4 * PUBLISHED_PARAMETERS  # float32
            print(f"{path.name:<34}{step if step >= 0 else '':>9}{size / 1e6:>8.1f}  {'yes' if there else 'no'}")
        return
    for name, url in jobs.items():
        download(name, url, args.out, args.sha256)


def main(argv=None):
    return run_command(fetch_models, argv)


if __name__ == "__main__":
    sys.exit(main())
