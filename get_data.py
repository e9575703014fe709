"""Get COCO, and find what is wrong with pictures and captions.

  python get_data.py download --max_images 40000   COCO's captions and that many of its pictures, into data/coco
  python get_data.py verify                        what is wrong with the pictures and captions that are there
  python get_data.py verify --put_aside            also rename damaged pictures to NAME.damaged: download replaces them

What it is not: support/coco.py talks to the server, data.py reads captions and pictures.
"""

import os
import sys
from collections import defaultdict
from functools import partial
from multiprocessing.pool import ThreadPool
from os.path import basename, exists, isdir, join

import data
from config import SDConfig
from support import coco, folders, pictures
from support.errors import UserError, printable, run_script, usage_error
from support.files import Damaged
from support.flags import Parser, positive_int
from support.show import Progress

UNREADABLE = "pictures that cannot be read"


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="download | verify")
    get = commands.add_parser("download", help="COCO's captions and a subset of its pictures")
    look = commands.add_parser("verify", help="list what is wrong with a data set")
    cfg, flag, shown, most = SDConfig(), get.add_argument, "(default: %(default)s)", coco.MOST_CONNECTIONS
    for command, run in ((get, download), (look, verify)):
        command.set_defaults(run=run)
        command.add_argument("--data_root", default=cfg.data_root, help=f"folder of the data set {shown}")
    flag("--max_images", type=positive_int, default=cfg.max_images, help=f"training pictures {shown}")
    flag("--held_out_images", type=positive_int, default=cfg.held_out_images, help=f"pictures of val2017 {shown}")
    flag("--base_url", default=coco.BASE_URL, help=f"a mirror with COCO's paths {shown}")
    flag("--zip_sha1", default=coco.ZIP_SHA1, help="checksum of the captions' zip, if not COCO's own")
    flag("--connections", type=positive_int, default=16, help=f"pictures at a time, at most {most} {shown}")
    look.add_argument("--dataset", choices=("coco", "folder"), default="coco", help=shown)
    for name in ("whole_captions", "follow_links"):
        look.add_argument(f"--{name}", action="store_true", help=SDConfig.__dataclass_fields__[name].metadata["help"])
    look.add_argument("--put_aside", action="store_true", help="rename COCO's damaged pictures to NAME.damaged")
    args = parser.parse_args()
    args.run(args)


def download(args):
    """Captions, then the pictures that training with the same --max_images reads."""
    if args.connections > coco.MOST_CONNECTIONS:
        usage_error(f"--connections: {args.connections} are too many; give at most {coco.MOST_CONNECTIONS}")
    root, train = args.data_root, SDConfig().captions_json
    names, jobs = [train, train.replace("train", "val")], []
    for path in (join(root, name) for name in names if exists(join(root, name))):
        try:
            data.read_captions(path)
        except Damaged as e:
            if not os.access(path, os.R_OK):  # a matter of permissions
                raise
            # no training could read it; kept all the same, for it may be somebody's own
            os.replace(path, f"{path}.damaged")
            print(f"{printable(e)}. Renamed to {basename(path)}.damaged")
    coco.get_captions(root, names, args.base_url, args.zip_sha1)
    for name, count in zip(names, (args.max_images, args.held_out_images)):
        captions, _ = data.read_captions(join(root, name))
        folder = data.pictures_folder(name, root)
        chosen = data.by_hash({picture: several for picture, several in captions.items() if several})[:count]
        jobs += [
            (f"{args.base_url}/{basename(folder)}/{picture}", join(root, folder, picture)) for picture, _ in chosen
        ]
    failed = coco.get_pictures(jobs, data.read_rgb, args.connections)
    for path, why in failed:
        print(f"{path}: {printable(why)}", file=sys.stderr)
    if failed:
        remedy = "give the same command again for these alone, or train with --skip_bad"
        raise UserError(f"--base_url: {len(failed)} of {len(jobs)} pictures could not be had (listed above); {remedy}")
    print(f"{len(jobs)} pictures are in {root}; next: python train_vae.py")


def verify(args):
    """Decode every picture that has captions; print what is wrong and what is odd."""
    root, is_coco = args.data_root, args.dataset == "coco"
    coco_again = f"python get_data.py verify --put_aside --data_root {root}"
    if args.put_aside and not is_coco:
        usage_error("--put_aside: is for coco, which can be downloaded anew; replace your own pictures")
    names = {name: getattr(args, name) for name in ("dataset", "data_root", "whole_captions", "follow_links")}
    files, allowed, wrong, odd = (list_coco if is_coco else list_folder)(SDConfig(**names))
    bad = look_at_all(files, allowed, odd)
    # what the system did not let us read need not be damaged
    damaged = [p for p, e in bad.items() if not isinstance(e, MemoryError) and getattr(e, "errno", None) is None]
    wrong[UNREADABLE] = [f"{p}: {type(e).__name__}: {e}" for p, e in bad.items()]
    for title, found in (("wrong, training stops", wrong), ("odd, training goes on", odd)):
        print(f"{title}:" if any(found.values()) else f"{title}: nothing")
        for what, where in found.items():
            if where:
                print_names(what, where)
    for path in damaged if args.put_aside else ():
        os.replace(path, f"{path}.damaged")
        del bad[path]
    if args.put_aside and damaged:
        what = f"python get_data.py download --data_root {root} gets anew those that training reads"
        print(f"{len(damaged)} of them are renamed to NAME.damaged; {what}")
    remedy = f"{coco_again} and then download replace them" if is_coco else "replace them"
    if args.put_aside:
        remedy = "see to their permissions, the disk and the memory, for they need not be damaged"
    if bad and all(folders.LEADS_OUT in str(e) for e in bad.values()):
        remedy = folders.LINK_REMEDY
    faults = [f"{len(wrong[what])} {what}; {remedy}" for what, remedy in folders.REMEDIES.items() if wrong.get(what)]
    if bad:
        faults.append(f"{len(bad)} of {len(files)} pictures cannot be read; {remedy}, or train with --skip_bad")
    if not is_coco and len(files) - len(bad) < 2:
        faults.append("fewer than two captioned pictures; give more, one is held out")
    if faults:
        raise UserError(f"--data_root {root}: {'; '.join(faults)} (all are listed above)")


def look_at_all(files, allowed, odd):
    """Note what is odd about pictures -> {path: the exception that says why it cannot be read}."""
    bad, progress = {}, Progress(len(files), "verify")
    with ThreadPool(os.cpu_count()) as pool:
        for path, found in zip(files, pool.imap(partial(look_at, allowed=allowed), files)):
            if isinstance(found, Exception):
                bad[path] = found
            else:
                for what, detail in found:
                    odd[what].append(f"{path}{detail}")
            progress.update()
    progress.close()
    return bad


def look_at(path, allowed):
    """-> what is odd about a picture, or the exception that says why it cannot be read."""
    try:
        if why := folders.leads_out(path, allowed):
            return OSError(why)
        data.read_rgb(path)
        return pictures.look_at(path, pictures.oddities)
    except Exception as e:  # decoders raise many kinds
        return e


def print_names(what, names, most=10):
    print(f"{len(names)} {what}")
    for name in [*sorted(names)[:most], *["..."] * (len(names) > most)] if names != ["?"] * len(names) else ():
        print(f"  {printable(name)}")


def list_coco(cfg):
    """-> the pictures that are there and have captions, where links may lead, what is wrong, and what is odd."""
    root, files, wrong, odd = cfg.data_root, [], {}, defaultdict(list)
    for name in data.captions_files(root, cfg.captions_json):
        folder = join(root, data.pictures_folder(name, root))
        captions, strange = data.read_captions(join(root, name))
        there = set(os.listdir(folder)) if isdir(folder) else set()
        odd |= {f"{what} in {name}": ["?"] * count for what, count in strange.items()}
        odd[folders.HIDDEN] += [join(folder, hidden) for hidden in there if folders.is_hidden(hidden)]
        there = {picture for picture in there if not folders.is_hidden(picture)}
        odd[f"pictures in {name}, but not in {folder}"] += captions.keys() - there
        odd[f"pictures in {folder}, but not in {name}"] += there - captions.keys()
        files += [join(folder, picture) for picture in sorted(there & captions.keys())]
    return files, None if cfg.follow_links else data.coco_folders(files, root), wrong, odd


def list_folder(cfg):
    """As list_coco(), of a folder of one's own."""
    found = folders.Folder(cfg)
    if not any(found.wrong.values()):
        found.check()
    if found.captions:
        print(found.summary())
    return sorted({*found.captions, *found.pictures}), found.allowed, found.wrong, found.odd


if __name__ == "__main__":
    run_script(main)
