"""Old releases make room."""

from florence2_release.release_record import Release
from florence2_release.repository import Repository


def prune(repository: Repository, keep: int) -> list[Release]:
    """Removes the models of all but the last `keep` releases of each name that have any, of none that is live,
    a candidate or gone back to; returns those that lost something. Records stay. Raises ValueError."""
    if keep < 0:
        raise ValueError(f"releases to keep are counted from 0 on, not {keep}")
    removed = []
    for name in repository.names():
        own = [release for release in repository.releases() if release.name == name and repository.is_there(release)]
        for release in own[: max(len(own) - keep, 0)]:
            if repository.state(release) not in ("live", "standby", "looked at"):
                repository.remove_models(release)
                removed.append(release)
    return removed
