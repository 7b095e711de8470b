"""From the address of a checkpoint to a local file: a path, an http(s) URL, or a file on the Hugging Face Hub.

    hf-hub:owner/name[@revision][/file]

Downloads are cached: URLs below ``torch.hub.get_dir()``, files of the Hub in the Hub's own cache (``HF_HOME``), which
works without a network too (``HF_HUB_OFFLINE=1``).
"""

import contextlib
import hashlib
import http.client
import logging
import os
import re
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

logger = logging.getLogger(__name__)

HUB = "hf-hub:"  # timm's prefix
HUB_ADDRESS = re.compile(
    HUB + r"(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<file>.*[^/]))?"
)
# A Hub address without a file means the first of these files, else the only file with one of these endings.
USUAL_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth", "best_checkpoint.pth")
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")
TIMEOUT_S = 60  # seconds without a byte from a server
ANOTHER_WAY = "or download the file by other means and pass its path"


class FetchError(Exception):
    """No file could be got from an address; the message names the address, the cause and the way out."""


def local_file(address: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Local path of the file at ``address``, downloaded if it is not cached.

    Files in the Hub's large-file storage, such as weights, are compared each time with the SHA-256 that the Hub gives
    for them: the Hub's own library compares sizes only.

    Args:
        address: A path (returned as it is, whether it exists or not), a URL, or
            ``hf-hub:owner/name[@revision][/file]``. Without a file: the first of `USUAL_FILES`, else the only file of
            weights in the repository.
        cache_dir: Cache for files from the Hub; None: the Hub's own.

    Raises:
        FetchError: No such file, several files to choose from, no access, no network, or a failed download.
    """
    if str(address).startswith(("http://", "https://")):
        return _from_url(str(address))
    if str(address).startswith(HUB):
        return _from_hub(str(address), cache_dir)
    return Path(address).expanduser()


def forget(address: str | Path, path: Path) -> None:
    """Removes a URL's download that is not a valid checkpoint; otherwise later runs would find it in the cache.

    Files of the Hub stay: they are what was published, and other programs share that cache.
    """
    if str(address).startswith(("http://", "https://")):
        path.unlink(missing_ok=True)


def _from_url(url: str) -> Path:
    """The download of a URL, compared with its SHA-256 each time: a bit in a cached file may have flipped.

    A file whose name holds the beginning of its SHA-256, as deit_small_patch16_224-cd65a155.pth, keeps its name and
    lies where torch.hub puts it. Other names, such as checkpoint.pth, are not unique: these files lie in a folder named
    by the hash of the URL, with the whole SHA-256 of the content before the name.
    """
    name = Path(urlparse(url).path).name[-100:] or "checkpoint"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    named = re.search(r"-([a-f0-9]{8,})\.", name)
    if named:
        kept = [(folder / name, named[1])]
    else:
        folder = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
        kept = [(path, path.name[:64]) for path in folder.glob(f"{'[0-9a-f]' * 64}-*")]
    for path, digest in kept:
        if path.is_file():
            if _sha256(path).startswith(digest):
                return path
            logger.warning(f"{path}, kept of {url}, is damaged: downloading it again")
            path.unlink()
    part = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer,
            tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file,
        ):
            part = Path(file.name)
            logger.info(f"downloading {url}")
            while block := answer.read(1 << 20):
                file.write(block)
            length = answer.headers.get("Content-Length")
            if length is not None and file.tell() != int(length):
                raise ValueError(f"{file.tell()} of {length} bytes came")
        digest = _sha256(part)
        if named and not digest.startswith(named[1]):
            raise ValueError(f"its SHA-256 begins with {digest[: len(named[1])]}, the hash in its name is another")
        return part.replace(folder / (name if named else f"{digest}-{name}"))
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
        raise FetchError(f"{url}: the download failed ({_brief(error)}): check the address, {ANOTHER_WAY}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _from_hub(address: str, cache_dir: str | Path | None) -> Path:
    parts = HUB_ADDRESS.fullmatch(address)
    if parts is None:
        raise FetchError(f"{address}: is not an address on the Hub: write {HUB}owner/name[@revision][/file]")
    repository, revision, file = parts.group("repository", "revision", "file")
    with _explained(address):
        if file is None:
            file = _choose(address, _files(repository, revision, cache_dir))
            logger.info("%s: taking its %s", address, file)
        try:
            path = Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            held = ", ".join(filter(_is_weights, _files(repository, revision, cache_dir))) or "none"
            raise FetchError(
                f"{address}: no {file} in that repository; its weights: {held}: name one of them"
            ) from error
    _check_digest(address, path)
    return path


def _choose(address: str, names: list[str]) -> str:
    weights = [name for name in names if _is_weights(name)]
    usual = [name for name in USUAL_FILES if name in weights]
    if usual or len(weights) == 1:
        return (usual or weights)[0]
    if not weights:
        raise FetchError(f"{address}: that repository holds no weights ({', '.join(WEIGHT_ENDINGS)}): check the name")
    raise FetchError(f"{address}: holds {', '.join(weights)}: name one of them, as in {address}/{weights[0]}")


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_ENDINGS)


def _files(repository: str, revision: str | None, cache_dir: str | Path | None) -> list[str]:
    """Names of a repository's files; if the Hub cannot be reached, of its files in the cache."""
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return [entry.rfilename for entry in info.siblings or []]
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (HTTPError, OSError):
        cached = _cached_files(repository, revision or constants.DEFAULT_REVISION, cache_dir)
        if not cached:
            raise
        return cached


def _cached_files(repository: str, revision: str, cache_dir: str | Path | None) -> list[str]:
    try:
        cache = scan_cache_dir(cache_dir or constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    return [
        file.file_path.relative_to(snapshot.snapshot_path).as_posix()
        for repo in cache.repos
        if (repo.repo_type, repo.repo_id) == ("model", repository)
        for snapshot in repo.revisions
        if revision in (snapshot.commit_hash, *snapshot.refs)
        for file in snapshot.files
    ]


def _check_digest(address: str, path: Path) -> None:
    """Compares a large file with its SHA-256, the name of its blob in the cache.

    There ``snapshots/<commit>/<file>`` links to ``blobs/<SHA-256>``.
    """
    digest = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return
    if _sha256(path) != digest:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise FetchError(
            f"{address}: its copy in the cache was damaged (SHA-256 differs from the Hub's) and has been removed: "
            "the same command downloads it again"
        )


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns errors of the Hub's library into a FetchError of one sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise FetchError(f"{address}: its owner grants access on its page: ask there, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{address}: the Hub knows no such repository, or it is private: check the name, or `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FetchError(f"{address}: no such revision: give a branch, tag or commit of that repository") from error
    except (HTTPError, OSError, ValueError) as error:
        if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            raise FetchError(
                f"{address}: is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set: unset it to "
                f"download, {ANOTHER_WAY}"
            ) from error
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise FetchError(
            f"{address}: the download from {constants.ENDPOINT} failed ({_brief(cause)}): check the network and the "
            f"address, {ANOTHER_WAY}"
        ) from error


def _brief(error: BaseException) -> str:
    """Describes an error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text[:200].splitlines()[0]}" if text else type(error).__name__
