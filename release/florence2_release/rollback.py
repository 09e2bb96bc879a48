"""Back to the release before."""

from florence2_release.model_control import Triton
from florence2_release.release_record import Release
from florence2_release.repository import Repository


def roll_back(
    repository: Repository, triton: Triton | None, name: str, number: int | None = None, reason: str = "asked for"
) -> Release:
    """The release before, or `number`, is live again; the one that was is not loaded any more. Goes on with what a
    killed command began. Raises ValueError where there is none to go back to."""
    live = repository.live(name)
    if live is None:
        raise ValueError(f"{repository.folder} has no release of {name}; `florence2 releases` lists them")
    running = repository.release(live)
    if number is None and running.standby is None and triton and triton.loaded().get(name, set()) != {live}:
        # The disk is there already.
        number = live
    number = running.standby if number is None else number
    if number is None:
        raise ValueError(f"release {live} of {name} has none before it that is kept; name one with --to")
    back = repository.release(number)
    if back.name != name:
        raise ValueError(f"release {number} is of {back.name}, not of {name}")
    if number != live:
        if damaged := repository.damage(back):
            raise ValueError(f"release {number} is not whole any more: {damaged} is missing or changed")
        running.outcome = f"rolled back: {reason}"
        repository.write(running)
        repository.make_live(back, None)
    repository.remove_candidate(name)
    if triton:
        triton.reconcile(repository)
    repository.reconcile()
    return back
