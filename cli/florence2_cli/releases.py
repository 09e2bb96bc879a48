"""List the releases of a model repository, or remove old ones."""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florence2_release.release_record import Release
    from florence2_release.repository import Repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", type=Path, required=True, metavar="REPO", help="the model repository")
    parser.add_argument("--url", metavar="HOST:PORT", help="the server's gRPC endpoint, to see what it has loaded")
    parser.add_argument(
        "--prune",
        type=int,
        metavar="KEEP",
        help="remove the models of all but the last KEEP releases of each name; what is live, or gone back to, stays",
    )
    parser.add_argument("--json", action="store_true", help="print everything that is recorded, as JSON")


def run(args: argparse.Namespace) -> int:
    from florence2_release.model_control import Triton
    from florence2_release.prune import prune
    from florence2_release.repository import Repository

    if not args.repository.is_dir():
        raise ValueError(f"{args.repository} is no folder; make a repository with `florence2 release`")
    repository = Repository(args.repository)
    if args.prune is not None:
        with repository.locked():
            for release in prune(repository, args.prune):
                print(f"removed release {release.number} of {release.name}")
        return 0
    repository.check()
    loaded = Triton(args.url).loaded() if args.url else None
    rows = [_row(repository, release, loaded) for release in repository.releases()]
    free = shutil.disk_usage(args.repository).free
    if args.json:
        print(json.dumps({"releases": rows, "free_bytes": free}, indent=2))
        return 0
    for row in rows:
        state = row["state"] + (", loaded" if row["loaded"] else "") + (", forced" if row["forced"] else "")
        scores = ", ".join(f"{name} {value:.4g}" for name, value in list(row["scores"].items())[:3])
        print(f"{row['number']:>4}  {row['name']}  {state}")
        data = (row["training"] or {}).get("data", {}).get("train", {}).get("sha256")
        made_of = [f"{row['manifest']['source']} {row['manifest']['sha256'][:8]}", row["manifest"]["precision"]]
        made_of += [f"data {data[:8]}"] if data else []
        print(f"      {', '.join(made_of)}{f'; {scores}' if scores else ''}")
    print(f"{free / 1e9:.1f} GB free")
    return 0


def _row(repository: "Repository", release: "Release", loaded: dict[str, set[int]] | None) -> dict[str, Any]:
    there = repository.is_there(release)
    row = asdict(release) | {"state": repository.state(release), "installed": there, "loaded": None}
    if loaded is not None:
        row["loaded"] = there and all(version in loaded.get(model, ()) for model, version in release.models.items())
    return row
