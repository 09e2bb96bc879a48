"""Make a fine-tune or an export the next release of a Triton model repository; with --url, bring it to live traffic."""

import argparse
import contextlib
import shutil
from pathlib import Path

EXTRA = "eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="an export, a checkpoint or its id on the hub, a run's folder, or an adapter"
    )
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="REPO", help="the model repository; made if missing"
    )
    parser.add_argument("--name", default="florence2", help="the model's, for clients; default %(default)s")
    parser.add_argument(
        "--url",
        metavar="HOST:PORT",
        help="gRPC endpoint of the server that reads the repository; left out, the release is served from the next "
        "start on",
    )
    parser.add_argument("--gate", type=Path, metavar="GATE.yaml", help="what the release has to reach to go live")
    parser.add_argument("--force", action="store_true", help="go live although the gate refuses; it is recorded")
    parser.add_argument(
        "--publish", metavar="COMMAND", help="brings REPO to where the server reads it, such as 'aws s3 sync ...'"
    )
    parser.add_argument("--metrics-url", metavar="URL", help="the server's metrics, for a gate with memory_gb")
    parser.add_argument("--profile", help="what REPO is served with, as `florence2 serve` takes it; not with --url")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for what is merged and exported on the way; default REPO.work"
    )


def run(args: argparse.Namespace) -> int:
    from florence2_release.install import check_name, install
    from florence2_release.make_export import prepare
    from florence2_release.repository import Repository

    check_name(args.name)
    Repository(args.repository).check()
    work = args.work or args.repository.with_name(f"{args.repository.name}.work")
    if not args.url:
        for option in ("gate", "force", "publish", "metrics_url"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')} says nothing without --url")
        prepared = prepare(args.source, work, _say)
        release = install(prepared.export, args.repository, args.name, prepared.training, args.profile)
        _say(f"{args.repository}: release {release.number} installed; it is served from the next start on")
        _remove(prepared.scratch)
        return 0
    if args.profile:
        raise ValueError("--profile is for a server that starts; with --url one is running")
    from florence2_release.gate import load_gate
    from florence2_release.model_control import Triton
    from florence2_release.rollout import Rollout

    gate, triton = load_gate(args.gate), Triton(args.url, args.publish)
    rollout = Rollout(Repository(args.repository), triton, gate, _say, args.metrics_url)
    prepared = prepare(args.source, work, _say)
    rollout.run(prepared, args.name, args.force)
    _remove(prepared.scratch)
    return 0


def _remove(scratch: Path | None) -> None:
    if scratch:
        shutil.rmtree(scratch)
        with contextlib.suppress(OSError):
            scratch.parent.rmdir()


def _say(line: str) -> None:
    print(line, flush=True)
