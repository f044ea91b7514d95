"""Fetch the models that the report published, or a shared one, into models/. A file gets its name once it is whole."""

import argparse
import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

from checkpoints import load_generator, read_model_file, step_of

DRIVE_IDS = {
    "generator_model_batch_12000.pt": "1MbFbA4S_UecZPw4BhoaOc1H83QwluuZf",
    "generator_model_batch_300000.pt": "17zuSetRxGMNBDQS1k7PJWLGM-15kyLap",
    "generator_model_batch_2166000.pt": "1t1Yy5uDD-zf-X-1XBSGi7aOdrHRwA7oC",
    "generator_model_batch_3462000.pt": "1J4EUE5xSUsuS7cuaSqsTwyzW6ZxmAx5y",
    "generator_model_batch_3924000.pt": "1j1xoJSWPUxM-GNpfxX0kDYNl1wYjR3Dz",
}
PUBLISHED_CONFIG = {"nz": 100, "ngf": 128, "nc": 3, "size": 128, "stem_norm": False, "blocks": "plain",
                    "attention": 0, "grown": False}  # fmt: skip
PUBLISHED_PARAMETERS = 20_362_819
TIMEOUT = 60  # seconds without a byte


def fetch_from_drive(drive_id, part):
    """Download the Google Drive file `drive_id` to `part`; gdown keeps what came of it beside `part` and goes on there.

    Raises ValueError without gdown, OSError where the Drive does not hand the file over.
    """
    try:
        import gdown
    except ImportError:
        raise ValueError("the published models lie on Google Drive, which takes gdown: pip install gdown") from None
    try:
        gdown.download(id=drive_id, output=str(part), resume=True, timeout=TIMEOUT)
    except Exception as error:  # gdown's own types, those of requests, and the system's
        raise OSError(f"Google Drive did not hand it over ({' '.join(str(error).split())})") from error


def fetch_from_url(url, part):
    """Download `url` to `part`, going on where an earlier call stopped if the server can (HTTP Range).

    Raises ValueError for a web page in the file's place, which leaves `part` as it was; OSError where the
    connection ends before the file does, which keeps what has come.
    """
    have = part.stat().st_size if part.is_file() else 0  # bytes
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing comes after `have`: the part is complete, or of another file; check() tells
            return
        raise OSError(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url} cannot be reached ({getattr(error, 'reason', error)})") from error
    if response.headers.get_content_type() == "text/html":
        raise ValueError(f"{url} is a web page, not a model")
    have = have if response.status == 206 else 0  # 200: the server starts from the beginning
    length = int(response.headers.get("Content-Length", 0))  # of what is sent now; 0: not announced
    bar = tqdm(total=have + length or None, initial=have, unit="B", unit_scale=True, desc=part.stem, leave=False)
    with response, bar, open(part, "ab" if have else "wb") as file:
        try:
            while chunk := response.read(1 << 16):
                bar.update(file.write(chunk))
            if file.tell() < have + length:
                raise OSError(f"{have + length:,} were announced")
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{url} broke off after {file.tell():,} bytes ({error})") from error


def fetch_sha256(url):
    """Return the sum in the file that `sha256sum` wrote beside `url` (its name and ".sha256"), None without one.

    Raises OSError where the server does not say whether there is one.
    """
    parts = urlsplit(url)
    try:
        with urllib.request.urlopen(parts._replace(path=parts.path + ".sha256").geturl(), timeout=TIMEOUT) as response:
            found = re.match(rb"([0-9a-fA-F]{64})\b", response.read(1024))
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):
            return None
        raise
    except http.client.HTTPException as error:
        raise OSError(f"{url}.sha256 cannot be read ({error})") from error
    return found and found[1].decode()


def check(path, name):
    """Return the dict of the model in `path`; run nothing in it.

    Raises ValueError unless the file is whole and undamaged, its weights fit its settings and, where `name` is
    one of the published names, it is the report's generator.
    """
    with open(path, "rb") as file:
        if file.read(512).lstrip().startswith(b"<"):
            raise ValueError("it is a web page, as Google Drive sends one when a file's quota is used up")
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            # torch.load ignores the checksums in it, so a flipped bit would become a strange face
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types for a damaged file
        damaged = error
    if damaged:
        raise ValueError(f"it is torn or damaged ({damaged})")
    generator = load_generator(path)
    parameters = sum(p.numel() for p in generator.parameters())
    if name in DRIVE_IDS and (generator.config != PUBLISHED_CONFIG or parameters != PUBLISHED_PARAMETERS):
        raise ValueError(
            f"it has {parameters:,} parameters and {generator.config}, "
            f"the report's generator {PUBLISHED_PARAMETERS:,} and {PUBLISHED_CONFIG}"
        )
    return read_model_file(path)


def check_sha256(path, sha256, came=None):
    """Raise ValueError unless `path` has this sum. came: the sum that it had before it was written anew."""
    found = came or hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256.lower():
        raise ValueError(f"its sha256 is {found}, not {sha256}")


def download(name, source, folder, sha256=None):
    """Fetch the model `name` into `folder` and return its path; one that is there already is checked and kept.

    source: a URL, or None for the Google Drive.  sha256: the sum that the file must have, as hex; None takes
    the one beside a URL where there is one. The report's pickles are written anew in this project's format,
    with the same numbers; any other model stays as it came, byte for byte.

    Raises ValueError for a file that cannot be fetched (what has come is kept) or is refused (it is deleted).
    """
    target = Path(folder) / name
    if target.is_file():
        try:
            file = check(target, name)
            if sha256:
                check_sha256(target, sha256, (file.get("made_by") or {}).get("sha256"))
        except ValueError as error:
            raise ValueError(f"{target} is there, but {error}; move it away and run this again") from error
        print(f"{target} is there already")
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    # Names apart: gdown takes a file under the name it was given for a complete one.
    part = target.with_name(name + (".part" if source else ".drive"))
    address = source or f"https://drive.google.com/file/d/{DRIVE_IDS[name]}/view"
    by_hand = f"open {address} in a browser and save the file as {target}, or name a mirror with --from"
    try:
        if source:
            fetch_from_url(source, part)
            sha256 = sha256 or fetch_sha256(source)
        else:
            fetch_from_drive(DRIVE_IDS[name], part)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}. Run this again to go on, or {by_hand}") from error
    try:
        if sha256:
            check_sha256(part, sha256)
        file = check(part, name)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{name}: what came was refused and deleted: {error}. You may {by_hand}") from error
    if name in DRIVE_IDS:
        # The file is written anew, so what it was has to be noted: --sha256 is about that.
        came = hashlib.sha256(part.read_bytes()).hexdigest()
        file["made_by"] = (file.get("made_by") or {}) | {"source": address, "sha256": came}
        torch.save(file, part)
    os.replace(part, target)
    print(f"{target}: step {file.get('step')}, {target.stat().st_size / 1e6:.1f} MB")
    return target


def list_models(folder):
    """Print name, step, size and state of the published models, then of any other model in `folder`."""
    print(f"{'name':<34}{'step':>9}{'MB':>8}  in {folder}")
    for name in dict.fromkeys([*DRIVE_IDS, *(p.name for p in sorted(folder.glob("*.pt")))]):
        here = folder / name
        begun = sum(p.stat().st_size for p in folder.glob(f"{name}.*"))
        state = "yes" if here.is_file() else f"{begun / 1e6:.1f} MB of it" if begun else "no"
        size = here.stat().st_size if here.is_file() else 4 * PUBLISHED_PARAMETERS  # float32
        step = step_of(Path(name))
        print(f"{name:<34}{step if step >= 0 else '':>9}{size / 1e6:>8.1f}  {state}")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="published models by name or step; all five without%(default).0s")
    parser.add_argument("--list", action="store_true", help="show name, step, size and what is there; fetch nothing")
    parser.add_argument(
        "--from", dest="mirror", metavar="URL", help="folder of a mirror, or one model file (.pt)%(default).0s"
    )
    parser.add_argument("--sha256", metavar="HEX", help="sum that the one file fetched must have%(default).0s")
    parser.add_argument("--out", type=Path, default=Path("models"), metavar="FOLDER", help="where the models go")
    return parser.parse_args(argv)


def plan(args):
    """Return what the flags ask for: a list of (name, URL or None for the Google Drive).

    Raises ValueError for an unknown model, a URL that is none, or --sha256 without exactly one file.
    """
    for name in args.names:
        if not any(name in (known, str(step_of(Path(known)))) for known in DRIVE_IDS):
            raise ValueError(f"{name}: no published model; choose from {', '.join(DRIVE_IDS)} or a step")
    names = [name for name in DRIVE_IDS if not args.names or {name, str(step_of(Path(name)))} & set(args.names)]
    jobs = [(name, None) for name in names]
    if args.mirror is not None:
        url = urlsplit(args.mirror)
        if url.scheme not in ("http", "https") or not url.netloc:
            raise ValueError(f"--from {args.mirror}: not a URL, it begins with https:// or http://")
        if url.path.endswith(".pt"):
            if args.names:
                raise ValueError(f"--from {args.mirror} is one file; leave out {' '.join(args.names)}")
            jobs = [(url.path.rsplit("/", 1)[1], args.mirror)]
        else:
            jobs = [(name, f"{args.mirror.rstrip('/')}/{name}") for name in names]
    if args.sha256 and (len(jobs) != 1 or not re.fullmatch("[0-9a-fA-F]{64}", args.sha256)):
        raise ValueError(f"--sha256 {args.sha256}: 64 hexadecimal digits, for one file only; name that file")
    return jobs


def main(argv=None):
    args = parse(argv)
    try:
        jobs = plan(args)
        if args.list:
            list_models(args.out)
        else:
            for name, source in jobs:
                download(name, source, args.out, args.sha256)
    except (ValueError, OSError) as error:
        print(f"download_model.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("download_model.py: stopped; run this again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
