"""A checkpoint on the Hugging Face hub: of its repository the files that are read, by name, and no others.

So a cache that Diffusers filled will do, offline too, whatever else the repository holds: other variants, pickles,
parts that are not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

from jaxwan.convert.files import check_variant, list_files, read_index, weight_files
from jaxwan.convert.rules import some


class NotInRepository(OSError):
    """A repository was asked for a file that it does not have."""


def fetch_file(repo: str, name: str) -> Path:
    """A file of the newest revision, in the folder that the cache has for that. Raises OSError, NotInRepository where
    the hub says that it has none of this name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _asking(f"{repo} is no local folder"):
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise NotInRepository(f"it has no {name}") from error


def fetch_files(repo: str, folder: Path, names: Sequence[str], *, optional: Sequence[str] = ()) -> None:
    """More files of the revision whose folder this is, of those that the repository has. Raises OSError that names what
    is missing; an `optional` file may be."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    missing = [name for name in names if not (folder / name).is_file()]
    with _asking(f"{repo} is not all here (no {some(missing)})"):
        if missing:
            snapshot_download(repo, revision=folder.name, allow_patterns=list(names))
        for name in optional:
            with suppress(EntryNotFoundError):
                hf_hub_download(repo, name, revision=folder.name)


def fetch_weights(
    repo: str, folder: Path, components: Sequence[str], variant: str | None, others: Sequence[str]
) -> None:
    """The tensors of these components, and other files, of the revision whose folder this is. Raises OSError.

    The repository's list is asked for where the cache has not all of them, or may lack the variant of some.
    """
    names, missing = [], None
    try:
        names = _choose(repo, folder, {name: list_files(folder / name) for name in components}, variant)
    except FileNotFoundError as error:
        missing = error
    if missing or variant:
        try:
            listed = _list_files(repo, folder.name)
        except OSError as error:
            if missing:
                raise OSError(f"{missing}, and the hub did not give it: {error}") from error
        else:
            names = _choose(repo, folder, {name: listed.get(name, []) for name in components}, variant)
    fetch_files(repo, folder, [*names, *others])


def _choose(repo: str, folder: Path, names: Mapping[str, Sequence[str]], variant: str | None) -> list[str]:
    """Which of these files, by component, hold its tensors; an index is fetched, so that its shards are known."""
    check_variant(variant, names, what=repo)
    chosen = []
    for component, files in names.items():

        def shards_of(index: str, component: str = component) -> list[str]:
            if not (folder / component / index).is_file():
                fetch_files(repo, folder, [f"{component}/{index}"])
            return read_index(folder / component / index)

        found = weight_files(files, shards_of, variant, what=f"{repo}/{component}")
        chosen += [f"{component}/{name}" for name in found]
    return chosen


def list_paths(repo: str, revision: str = "main") -> list[str]:
    """The paths of all files of a revision of a repository. Raises OSError."""
    from huggingface_hub import list_repo_files

    try:
        return list(list_repo_files(repo, revision=revision))
    except Exception as error:  # those of the HTTP library, which is another one in other releases of the hub's
        raise OSError(_reason(error)) from error


def _list_files(repo: str, revision: str) -> dict[str, list[str]]:
    """Folder -> the files in it, of a revision of a repository. Raises OSError."""
    paths = [path.rpartition("/") for path in list_paths(repo, revision)]
    return {folder: [name for other, _, name in paths if other == folder] for folder, _, _ in paths}


@contextmanager
def _asking(lacking: str) -> Iterator[None]:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        yield
    except NotInRepository as error:
        raise NotInRepository(f"{lacking}, and the hub did not give it: {error}") from error
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        raise OSError(f"{lacking}, and the hub did not give it: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return shorten(str(error.__cause__), 400, placeholder=" …")  # the error says no more than that there was one
    return shorten(str(error), 400, placeholder=" …")
