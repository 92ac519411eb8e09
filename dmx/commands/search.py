"""Search a gallery for the people on query images: a ranking as a table, JSON, or a page to look at.

GALLERY is a data set (ingested, or in any known layout; all of its images, or those of --split), features in
Parquet as `dmx embed` writes them, or a folder that --index has made. Every QUERY is an image file, or a data
set, of which the query images are taken, or all where it has none. Similarity is the cosine of embeddings, at
most 1. Hits are told right or wrong where the identities of both images are known and are numbers of one data
set; an image of a data set is no hit of its own.

--index keeps what was embedded: with the same model and gallery it is opened the next time, and with others
refused. A gallery that was not ingested is known by the names and labels of its images, and some of their
contents. Millions of images are embedded by `dmx embed` first, on all machines of a cluster.

  dmx search data/mall data/mall --split gallery --model runs/first --out ranking.html
  dmx search data/mall someone.jpg --model runs/first --index index/mall --top 5
  dmx search index/mall someone.jpg --model runs/first --out ranking.json
  dmx search features/mall data/mall --model runs/first --index-type ivf --out ranking.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmx.commands.outputs import require_writable
from dmx.commands.sources import (
    CHECKPOINT_HELP,
    add_best_argument,
    add_input_arguments,
    add_layout_arguments,
    warn_as,
)

if TYPE_CHECKING:
    from dmx.search.encoder import Encoder
    from dmx.search.gallery import Gallery
    from dmx.search.images import Reading
    from dmx.search.index import Index, Kind
    from dmx.search.queries import Queries
    from dmx.search.ranking import Answer
    from dmx.search.stored import StoredIndex

SUMMARY = "search a gallery for the people on query images"
# Images left out that are listed; a broken disk may have any number.
LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("gallery", metavar="GALLERY", help="data set, features in Parquet, or index")
    parser.add_argument("queries", metavar="QUERY", nargs="+", help="image file, or data set")
    parser.add_argument(
        "--model",
        required=True,
        metavar="RUN",
        help=CHECKPOINT_HELP,
    )
    add_best_argument(parser)
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="hits a query (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="ranking.json, or ranking.html: a page with pictures (default: a table on the terminal)",
    )
    parser.add_argument("--no-images", action="store_true", help="leave pictures out of the page")
    parser.add_argument(
        "--split",
        choices=("all", "train", "query", "gallery"),
        default="all",
        help="which images of a data set are the gallery (default: %(default)s)",
    )
    parser.add_argument(
        "--same-identities",
        action="store_true",
        help="identities of QUERY and GALLERY are numbers of the same people, though they are different sets",
    )
    parser.add_argument(
        "--index", type=Path, metavar="FOLDER", help="keep the index there, or take it from there"
    )
    parser.add_argument(
        "--index-type",
        choices=("flat", "ivf"),
        help="flat compares a query with the whole gallery; ivf with some lists of it, and measures how many "
        "of the nearest it finds (default: flat, or what the index is)",
    )
    parser.add_argument(
        "--probes", type=int, metavar="N", help="ivf: lists searched for a query (default: 256, or all)"
    )
    add_layout_arguments(parser, "a data set that was not ingested")
    add_input_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Open or build the index, rank it for every query, write the ranking."""
    from dmx.search.images import Reading
    from dmx.search.queries import open_queries
    from dmx.search.ranking import rank

    # Everything is looked at before anything is embedded: a mistake should not cost that time.
    _check(args)
    reading = Reading(args.layout, args.camera, args.camera_pattern)
    encoder = _encoder(args)
    source = _opened(args, encoder, reading)
    queries = open_queries(args.queries, reading, source.origin, args.same_identities, warn_as("search"))
    embeddings = encoder.embed_all(queries.split, "query")
    index = _index(args, encoder, source)
    _write(args, list(rank(index, queries, embeddings, args.top)), index, queries)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of their range, results that could not be written, and a machine without faiss."""
    from dmx.errors import DmxError
    from dmx.search.index import require_faiss
    from dmx.search.output import SUFFIXES

    for option in ("top", "probes", "batch_size", "height", "width"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise DmxError(f"--{option.replace('_', '-')}: wanted at least 1, found {value}")
    if args.probes is not None and args.index_type == "flat":
        raise DmxError("--probes: wanted an index of lists, found --index-type flat; leave one of them out")
    if args.out is not None:
        require_writable(args.out, SUFFIXES)
    if args.index is not None and ":/" in str(args.index):
        raise DmxError(f"--index: wanted a local folder, found {args.index}; faiss reads no other")
    require_faiss()


def _encoder(args: argparse.Namespace) -> Encoder:
    from dmx.device import chosen_device
    from dmx.search.encoder import Encoder
    from dmx.train.checkpoint import BEST, LATEST, load_model

    device = chosen_device(args.device, "--device")
    model, config = load_model(args.model, BEST if args.best else LATEST)
    return Encoder(
        args.model,
        model.to(device),
        height=args.height or config.data.height,
        width=args.width or config.data.width,
        batch_size=args.batch_size,
        device=device,
        flip=args.flip,
    )


def _opened(args: argparse.Namespace, encoder: Encoder, reading: Reading) -> Gallery | StoredIndex:
    """What to search: an index that is there and fits, or else the gallery."""
    from dmx.errors import DmxError
    from dmx.search.gallery import open_gallery
    from dmx.search.stored import StoredIndex, is_index, require_place

    if is_index(args.gallery):
        for option in ("index", "split"):
            if getattr(args, option) not in (None, "all"):
                raise DmxError(
                    f"--{option} {getattr(args, option)}: wanted a data set or features to make an index of, "
                    f"found an index, {args.gallery}; leave --{option} out"
                )
        stored = StoredIndex(Path(args.gallery))
    else:
        gallery = open_gallery(args.gallery, args.split, reading, warn_as("search"))
        gallery.require(encoder)
        if args.index is None:
            return gallery
        if not is_index(args.index):
            require_place(args.index)
            return gallery
        stored = StoredIndex(args.index)
        stored.require_gallery(gallery)
    stored.require_model(encoder.record)
    stored.require_kind(args.index_type, args.probes)
    return stored


def _index(args: argparse.Namespace, encoder: Encoder, source: Gallery | StoredIndex) -> Index:
    """Read or build it; tells which, what was left out, and how good it is, on stderr."""
    from dmx.search.index import build, with_probes
    from dmx.search.stored import StoredIndex, write_index

    if isinstance(source, StoredIndex):
        index = source.read()
        if args.probes is not None:
            index = with_probes(index, args.probes, args.top)
        print(f"{source.folder} is opened: {len(index):,} images", file=sys.stderr)
    else:
        kind: Kind = args.index_type or ("flat" if args.probes is None else "ivf")
        index = build(source, encoder, kind, args.probes, args.top)
        if args.index is not None:
            write_index(index, args.index)
            print(f"{args.index} is written: {len(index):,} images", file=sys.stderr)
    _tell_left_out(index)
    if index.lists is not None:
        text, is_low = index.lists.told()
        print(f"{'warning: ' if is_low else ''}{text}", file=sys.stderr)
    return index


def _tell_left_out(index: Index) -> None:
    """List images that cannot be decoded, the first of them if there are many."""
    from dmx.names import printable

    count = len(index.left_out)
    if not count:
        return
    images = "1 image of the gallery is" if count == 1 else f"{count:,} images of the gallery are"
    warn_as("search")(f"{images} left out")
    for item in index.left_out[:LISTED]:
        print(f"  {printable(item.key)}: {item.reason}", file=sys.stderr)
    if count > LISTED:
        print(
            f"  and {count - LISTED:,} more, which --index lists in skipped.jsonl and --out in JSON",
            file=sys.stderr,
        )


def _write(args: argparse.Namespace, answers: list[Answer], index: Index, queries: Queries) -> None:
    from dmx.page import PAGES
    from dmx.search.output import print_tables, write_html, write_json
    from dmx.search.ranking import told

    if args.out is None:
        print_tables(answers)
        print(told(answers))
        return
    size = ""
    if args.out.suffix.lower() in PAGES:
        write_html(args.out, answers, index, queries, not args.no_images, warn_as("search"))
        size = f" ({args.out.stat().st_size / 1e6:.1f} MB)"
    else:
        write_json(args.out, answers, index)
    print(f"{args.out}: {told(answers)}{size}")
