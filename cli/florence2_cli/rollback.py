"""Go back to the release before the live one."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", type=Path, required=True, metavar="REPO", help="the model repository")
    parser.add_argument("--name", default="florence2", help="the model's, for clients; default %(default)s")
    parser.add_argument(
        "--url", metavar="HOST:PORT", help="the server's gRPC endpoint; left out, it is served from the next start on"
    )
    parser.add_argument("--to", type=int, metavar="N", help="that release; left out, the one before")
    parser.add_argument("--publish", metavar="COMMAND", help="as for `florence2 release`")


def run(args: argparse.Namespace) -> int:
    from florence2_release import startup
    from florence2_release.model_control import Triton
    from florence2_release.repository import Repository
    from florence2_release.rollback import roll_back

    repository = Repository(args.repository)
    if not args.repository.is_dir():
        raise ValueError(f"{args.repository} is no folder; name a model repository")
    if args.url:
        startup.check_up_to_date(repository)
    triton = Triton(args.url, args.publish) if args.url else None
    with repository.locked():
        release = roll_back(repository, triton, args.name, args.to)
    when = "is live" if args.url else "is served from the next start on"
    print(f"release {release.number} of {release.name} {when}")
    return 0
